-- Requests that wait for room, in one order for all gateways. A class is a model with a set of needs. Between tenants
-- turns go by weight (start-time fair queueing, Goyal et al. 1996): `turns` holds each one's virtual time. Within a
-- tenant `wait` goes by arrival, moved by the priority: ageing, since one who has waited longer gets ahead in the end.
-- An entry is '<gateway>/<deadline ms>/<id>'; those of a gateway that polls no more, or past their time, count nothing.
local POLL_MS = 3000

local function wait_key(class, tenant) return base .. 'wait:' .. tenant .. ':' .. class end

-- The first live entry of a tenant, or nil.
local function first_of(class, tenant, now)
  repeat
    local entry = redis.call('ZRANGE', wait_key(class, tenant), 0, 0)[1]
    if not entry then return nil end
    local gateway, deadline = string.match(entry, '^(.-)/(%d+)/')
    local polled = gateway and redis.call('ZSCORE', base .. 'pollers', gateway)
    if polled and tonumber(polled) + POLL_MS >= now and tonumber(deadline) >= now then return entry end
    redis.call('ZREM', wait_key(class, tenant), entry)
  until false
end

-- The entry whose turn it is, with its tenant; nil when nobody waits. `quiet`: classes in which this call saw nobody.
local quiet = {}

local function head(class, now)
  if quiet[class] then return nil end
  for _, tenant in ipairs(redis.call('ZRANGE', base .. 'turns:' .. class, 0, -1)) do
    local entry = first_of(class, tenant, now)
    if entry then return entry, tenant end
    redis.call('ZREM', base .. 'turns:' .. class, tenant)
  end
  quiet[class] = true
end

-- How many wait in a class.
local function waiting(class)
  local count = 0
  for _, tenant in ipairs(redis.call('ZRANGE', base .. 'turns:' .. class, 0, -1)) do
    count = count + redis.call('ZCARD', wait_key(class, tenant))
  end
  return count
end

-- Takes a place. One who comes back after a rest begins where the others are, and has saved nothing up.
local function enqueue(class, tenant, entry, score, now)
  local turns = base .. 'turns:' .. class
  quiet[class] = nil
  if not redis.call('ZSCORE', turns, tenant) then
    local least = redis.call('ZRANGE', turns, 0, 0, 'WITHSCORES')
    redis.call('ZADD', turns, least[2] or 0, tenant)
  end
  redis.call('ZADD', wait_key(class, tenant), 'NX', score, entry)
  redis.call('ZADD', base .. 'pollers', now, string.match(entry, '^(.-)/'))
end

-- Leaves, served with `tokens` (0 when it gave up).
local function dequeue(class, tenant, entry, tokens, weight)
  if redis.call('ZREM', wait_key(class, tenant), entry) == 1 and tokens > 0 then
    redis.call('ZADD', base .. 'turns:' .. class, 'XX', 'INCR', tokens / weight, tenant)
  end
end
