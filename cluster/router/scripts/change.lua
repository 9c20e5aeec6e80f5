-- Changes what a registered worker is routed for: its role ('draining' takes no more requests) or its capabilities.
-- ARGV: 1 worker id, 2 epoch, 3 'role' or 'caps', 4 the new value, 5 (caps) the registration as JSON.
-- Returns 0 if the epoch is not the registered one.
local id, key = ARGV[1], worker_key(ARGV[1])
local w = redis.call('HMGET', key, 'epoch', 'model', 'role', 'profile', 'caps')
if w[1] ~= ARGV[2] then return 0 end
if ARGV[3] == 'caps' then
  redis.call('HSET', key, 'info', ARGV[5], 'caps', ARGV[4])
else
  redis.call('HSET', key, 'role', ARGV[4], 'home', ARGV[4])
end
local profile = profile_of(w[2], redis.call('HGET', key, 'caps'))
redis.call('HSET', key, 'profile', profile)
charge(id, w[1], 0, 0, 0, 0)
if w[3] ~= 'draining' and (w[3] ~= redis.call('HGET', key, 'role') or w[4] ~= profile) then unplace(id, w[2], w[3], w[4]) end
return 1
