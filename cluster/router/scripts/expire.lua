-- Ends leases past their time and forgets workers without a heartbeat and old sessions, a bounded number of each.
-- A clock that has jumped, or a time when nobody ran, gives everyone a grace: who lives can say so before being judged.
-- ARGV: 1 now (ms), 2 worker ttl (ms), 3 lease (ms), 4 most of each in one call. Returns the counts of the first two.
local now, ttl, lease, limit = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local last = tonumber(redis.call('GET', base .. 'clock') or now)
redis.call('SET', base .. 'clock', ARGV[1])
if now > last + lease + ttl or now < last - ttl then redis.call('SET', base .. 'grace', now + lease) end
local leases, silent = {}, {}
for _, each in ipairs({ { 'leases', lease }, { 'beats', 0 } }) do -- what a clock that was ahead has written
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', base .. each[1], now + lease + ttl, '+inf', 'LIMIT', 0, limit)) do
    redis.call('ZADD', base .. each[1], now + each[2], id)
    local w = each[1] == 'beats' and worker(id)
    if w then
      w.beat = now
      put(w)
    end
  end
end
if oldest_beat(now, ttl) >= 0 then
  leases = redis.call('ZRANGEBYSCORE', base .. 'leases', '-inf', now, 'LIMIT', 0, limit)
  for _, id in ipairs(leases) do end_lease(id) end
  silent = redis.call('ZRANGEBYSCORE', base .. 'beats', '-inf', '(' .. (now - ttl), 'LIMIT', 0, limit)
  for _, id in ipairs(silent) do drop_worker(id) end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', base .. 'session_ends', '-inf', now, 'LIMIT', 0, limit)) do
  redis.call('ZREM', base .. 'session_ends', id)
  redis.call('HDEL', base .. 'sessions', id)
end
redis.call('ZREMRANGEBYSCORE', base .. 'pollers', '-inf', now - 60000)
write_workers()
return { #leases, #silent }
