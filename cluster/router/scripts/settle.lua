-- Settles one sample of a lease, exactly once however often it is called; the last sample ends the lease.
-- ARGV: 1 lease id, 2 lease epoch, 3 sample, 4 tokens it generated, of which no more count than it had reserved.
-- Returns 1 if this call settled it.
local l, sample = lease(ARGV[1]), tonumber(ARGV[3])
if not l or l.epoch ~= ARGV[2] then return 0 end
if l.n > 1 and (sample >= 100000 or redis.call('SETBIT', base .. 'ended:' .. l.id, sample, 1) == 1) then return 0 end
l.ended, l.used = l.ended + 1, l.used + math.max(0, math.min(l.new, tonumber(ARGV[4])))
if l.ended < l.n then
  keep_lease(l)
  charge(l.d, l.d_epoch, 0, -l.new, -l.new, -1)
else
  close_lease(l, 1)
end
write_workers()
return 1
