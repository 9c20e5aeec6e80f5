-- Which worker a session was served by last; forgotten after a while (`expire.lua`).
local function remember(session, worker, until_ms)
  redis.call('HSET', base .. 'sessions', session, worker)
  redis.call('ZADD', base .. 'session_ends', until_ms, session)
end
