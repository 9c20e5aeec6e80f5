-- Forgets a worker that leaves. ARGV: 1 worker id, 2 epoch. Returns 0 if another life of it is registered, or none.
if redis.call('HGET', worker_key(ARGV[1]), 'epoch') ~= ARGV[2] then return 0 end
return drop_worker(ARGV[1])
