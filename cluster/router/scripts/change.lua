-- Changes what a registered worker is routed for: its role ('draining' takes no more requests) or its capabilities.
-- ARGV: 1 worker id, 2 epoch, 3 'role' or 'caps', 4 the new value, 5 (caps) the registration as JSON.
-- Returns 0 if the epoch is not the registered one.
local w, key = worker(ARGV[1]), worker_key(ARGV[1])
if not w or w.epoch ~= ARGV[2] then return 0 end
local role, profile = w.role, w.profile
if ARGV[3] == 'caps' then
  redis.call('HSET', key, 'info', ARGV[5], 'caps', ARGV[4])
else
  w.role, w.home = ARGV[4], ARGV[4]
end
w.profile = profile_of(w.model, redis.call('HGET', key, 'caps'))
put(w)
if role ~= 'draining' and (role ~= w.role or profile ~= w.profile) then unplace(w.id, w.model, role, profile) end
write_workers()
return 1
