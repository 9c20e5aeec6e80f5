-- Ends leases past their time and forgets workers without a heartbeat, a bounded number of each.
-- ARGV: 1 now (ms), 2 worker ttl (ms), 3 most of each in one call. Returns both counts.
local now, limit = tonumber(ARGV[1]), tonumber(ARGV[3])
local leases = redis.call('ZRANGEBYSCORE', base .. 'leases', '-inf', now, 'LIMIT', 0, limit)
for _, id in ipairs(leases) do end_lease(id) end
local silent = redis.call('ZRANGEBYSCORE', base .. 'beats', '-inf', '(' .. (now - tonumber(ARGV[2])), 'LIMIT', 0, limit)
for _, id in ipairs(silent) do drop_worker(id) end
return { #leases, #silent }
