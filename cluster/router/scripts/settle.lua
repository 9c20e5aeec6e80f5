-- Settles samples of leases, each exactly once however often it is called; the last sample ends its lease.
-- ARGV, of each: lease id, lease epoch, sample, tokens it generated, of which no more count than it had reserved.
-- Returns for each 1 if this call settled it, else 0.
local function settle(id, epoch, sample, generated)
  local l = lease(id)
  if not l or l.epoch ~= epoch then return 0 end
  if l.n > 1 and (sample >= 100000 or redis.call('SETBIT', base .. 'ended:' .. id, sample, 1) == 1) then return 0 end
  l.ended, l.used = l.ended + 1, l.used + math.max(0, math.min(l.new, generated))
  if l.ended < l.n then
    keep_lease(l)
    charge(l.d, l.d_epoch, 0, -l.new, -l.new, -1)
  else
    close_lease(l, 1)
  end
  write_workers() -- at once: a lease that is gone owes nothing, whatever becomes of the others
  return 1
end

local settled = {}
for i = 1, #ARGV, 4 do
  settled[#settled + 1] = settle(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]))
end
return settled
