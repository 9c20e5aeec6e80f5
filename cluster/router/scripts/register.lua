-- Admits a worker with a fresh epoch and no pending tokens, or refuses it.
-- ARGV: 1 worker id, 2 model, 3 role, 4 model digest, 5 KV layout, 6 now (ms), 7 worker ttl (ms),
--   8 capabilities (each between newlines), 9 adapters loaded (JSON list), 10 registration (JSON),
--   11 engine address, 12 KV address
local id, model, role, now = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[6])
local oldest = now - tonumber(ARGV[7])

for _, peers in ipairs({ 'prefill', 'decode', 'mixed' }) do
  for _, peer in ipairs(redis.call('ZRANGE', queue_key(peers, model), 0, -1)) do
    local theirs = redis.call('HMGET', worker_key(peer), 'beat', 'digest', 'layout')
    if not theirs[1] or tonumber(theirs[1]) < oldest then
      drop_worker(peer) -- silent for too long; should it come back, it must register and be compared
    elseif peer ~= id and theirs[2] ~= ARGV[4] then
      return { 'digest', peer, theirs[2] }
    elseif peer ~= id and theirs[3] ~= ARGV[5] then
      return { 'layout', peer, theirs[3] }
    end
  end
end

local loaded = {}
for _, name in ipairs(cjson.decode(ARGV[9])) do loaded[name] = true end
for _, name in ipairs(redis.call('HKEYS', base .. 'adapters:' .. model)) do
  if not loaded[name] then return { 'adapter', name } end
end

drop_worker(id) -- an earlier life of this worker: its leases have nothing to give back here
local epoch = next_epoch(ARGV[6])
redis.call('HSET', worker_key(id), 'epoch', epoch, 'model', model, 'role', role, 'digest', ARGV[4], 'layout', ARGV[5],
  'caps', ARGV[8], 'info', ARGV[10], 'engine', ARGV[11], 'kv', ARGV[12], 'beat', ARGV[6], 'load', '',
  'prefill', 0, 'decode', 0)
redis.call('ZADD', base .. 'beats', now, id)
redis.call('ZADD', queue_key(role, model), 0, id)
return { 'ok', epoch }
