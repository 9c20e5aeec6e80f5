-- Extends leases whose requests still run. Returns the ids of those that are no more.
-- ARGV: 1 now (ms), 2 lease (ms), then pairs of lease id and lease epoch
local expires, lost = tonumber(ARGV[1]) + tonumber(ARGV[2]), {}
for i = 3, #ARGV, 2 do
  local l = lease(ARGV[i])
  if l and l.epoch == ARGV[i + 1] then
    redis.call('ZADD', base .. 'leases', 'GT', expires, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
