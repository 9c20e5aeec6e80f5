-- A worker is alive, and this loaded. Returns 0 if its epoch is not the registered one: it must register again.
-- ARGV: 1 worker id, 2 epoch, 3 now (ms), 4 load (JSON), 5 us a prompt token, 6 us a decode step (0: not known yet)
local w, per_token, per_step = worker(ARGV[1]), tonumber(ARGV[5]), tonumber(ARGV[6])
if not w or w.epoch ~= ARGV[2] then return 0 end
w.beat = math.max(w.beat, tonumber(ARGV[3])) -- a clock that steps back kills nobody
if per_token > 0 then w.per_token = per_token end
if per_step > 0 then w.per_step = per_step end
redis.call('HSET', worker_key(w.id), 'load', ARGV[4])
redis.call('ZADD', base .. 'beats', w.beat, w.id)
add_work(w, w.role, 0, 0, 0, 0) -- another speed is another place
write_workers()
return 1
