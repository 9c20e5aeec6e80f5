-- Settles one sample of a lease, exactly once however often it is called; the last sample ends the lease.
-- ARGV: 1 lease id, 2 lease epoch, 3 sample, 4 tokens it generated. Returns 1 if this call settled it.
if redis.call('HGET', base .. 'lease:' .. ARGV[1], 'epoch') ~= ARGV[2] then return 0 end
return end_sample(ARGV[1], ARGV[3], tonumber(ARGV[4]))
