-- Ending leases. A lease holds `n` samples on one pair of workers: the prompt is charged once, each sample's new tokens
-- by itself. Fields: p, pe, pt (prefill worker, epoch, tokens), d, de, dt (decode: prompt tokens), g (new tokens of one
-- sample), n (samples), left (not settled yet), tenant, used (tokens generated), x<i> (sample i is settled).

-- Ends a lease and gives back what it still holds; 0 if there is none.
local function end_lease(id)
  local key = base .. 'lease:' .. id
  local l = redis.call('HMGET', key, 'p', 'pe', 'pt', 'd', 'de', 'dt', 'g', 'n', 'left', 'tenant', 'used')
  redis.call('ZREM', base .. 'leases', id)
  if not l[1] then return 0 end
  redis.call('DEL', key)
  local left = tonumber(l[9])
  if l[3] ~= '0' then charge(l[1], l[2], -tonumber(l[3]), 0, 0, 0) end
  charge(l[4], l[5], 0, -(tonumber(l[6]) + left * l[7]), -left * l[7], -left)
  if l[10] ~= '' then leave_tenant(l[10], (l[8] - left) * l[7] - l[11]) end
  return 1
end

-- Settles one sample of a lease, exactly once however often it is asked; the last one ends the lease.
-- `used`: tokens that it generated, at most what it had reserved.
local function end_sample(id, sample, used)
  local key = base .. 'lease:' .. id
  local l = redis.call('HMGET', key, 'd', 'de', 'g', 'left')
  if not l[1] or tonumber(sample) >= 100000 or redis.call('HSETNX', key, 'x' .. sample, 1) == 0 then return 0 end
  redis.call('HINCRBY', key, 'used', math.max(0, math.min(tonumber(l[3]), used)))
  redis.call('HINCRBY', key, 'left', -1)
  charge(l[1], l[2], 0, -tonumber(l[3]), -tonumber(l[3]), -1)
  if tonumber(l[4]) <= 1 then return end_lease(id) end
  return 1
end
