-- Changes what a registered worker is routed for: its role ('draining' takes no more requests) or its capabilities.
-- ARGV: 1 worker id, 2 epoch, 3 'role' or 'caps', 4 the new value, 5 (caps) the registration as JSON.
-- Returns 0 if the epoch is not the registered one.
local id, key = ARGV[1], worker_key(ARGV[1])
local worker = redis.call('HMGET', key, 'epoch', 'model', 'role', 'prefill', 'decode')
if worker[1] ~= ARGV[2] then return 0 end
redis.call('HSET', key, ARGV[3], ARGV[4])
if ARGV[3] == 'caps' then
  redis.call('HSET', key, 'info', ARGV[5])
  return 1
end
redis.call('ZREM', queue_key(worker[3], worker[2]), id)
if ARGV[4] ~= 'draining' then
  redis.call('ZADD', queue_key(ARGV[4], worker[2]), tonumber(worker[4]) + tonumber(worker[5]), id)
end
return 1
