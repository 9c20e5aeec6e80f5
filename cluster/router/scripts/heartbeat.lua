-- A worker is alive, and this loaded. Returns 0 if its epoch is not the registered one: it must register again.
-- ARGV: 1 worker id, 2 epoch, 3 now (ms), 4 load (JSON), 5 us a prompt token, 6 us a decode step (0: not known yet)
local key = worker_key(ARGV[1])
local known = redis.call('HMGET', key, 'epoch', 'beat', 'per_token', 'per_step')
if known[1] ~= ARGV[2] then return 0 end
local beat = math.max(tonumber(known[2]), tonumber(ARGV[3])) -- a clock that steps back kills nobody
redis.call('HSET', key, 'beat', beat, 'load', ARGV[4], 'per_token', ARGV[5] ~= '0' and ARGV[5] or known[3],
  'per_step', ARGV[6] ~= '0' and ARGV[6] or known[4])
redis.call('ZADD', base .. 'beats', beat, ARGV[1])
charge(ARGV[1], ARGV[2], 0, 0, 0, 0) -- another speed is another place
return 1
