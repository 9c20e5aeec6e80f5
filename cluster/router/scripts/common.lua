-- Shared by every script. KEYS[1]: base of all keys of one cluster ('{jw:<cluster>}:v1:'); every key below derives
-- from it, so all lie in one hash slot. Epochs are compared as the strings they are: Lua's numbers would round them.
local base = KEYS[1]

local function worker_key(id) return base .. 'worker:' .. id end
local function queue_key(role, model) return base .. 'queue:' .. role .. ':' .. model end

-- The next epoch. The counter starts at the time (us), so that epochs stay unique when Redis loses its data.
local function next_epoch(now_ms)
  redis.call('SET', base .. 'epoch', now_ms .. '000', 'NX')
  redis.call('INCR', base .. 'epoch')
  return redis.call('GET', base .. 'epoch')
end

-- Takes pending tokens off a worker. One that is gone or has started anew (another epoch) owes nothing.
local function release(id, epoch, phase, tokens)
  local worker = redis.call('HMGET', worker_key(id), 'epoch', 'model', 'role')
  if tokens == 0 or worker[1] ~= epoch then return end
  redis.call('HINCRBY', worker_key(id), phase, -tokens)
  redis.call('ZADD', queue_key(worker[3], worker[2]), 'XX', 'INCR', -tokens, id)
end

-- Ends a lease and gives back what it still holds; 0 if there is none.
local function end_lease(id)
  local key = base .. 'lease:' .. id
  local lease = redis.call('HMGET', key, 'p', 'pe', 'pt', 'd', 'de', 'dt')
  redis.call('ZREM', base .. 'leases', id)
  if not lease[1] then return 0 end
  redis.call('DEL', key)
  release(lease[1], lease[2], 'prefill', tonumber(lease[3]))
  release(lease[4], lease[5], 'decode', tonumber(lease[6]))
  return 1
end

-- Forgets a worker. Leases on it stay until they are settled or expire, and then find nothing to give back.
local function drop_worker(id)
  local worker = redis.call('HMGET', worker_key(id), 'model', 'role')
  if worker[1] then redis.call('ZREM', queue_key(worker[2], worker[1]), id) end
  redis.call('ZREM', base .. 'beats', id)
  return redis.call('DEL', worker_key(id))
end
