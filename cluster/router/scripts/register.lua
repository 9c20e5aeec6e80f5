-- Admits a worker with a fresh epoch and no pending tokens, or refuses it.
-- ARGV: 1 worker id, 2 model, 3 role, 4 model digest, 5 KV layout, 6 now (ms), 7 worker ttl (ms),
--   8 capabilities (each between newlines), 9 adapters loaded (JSON list), 10 registration (JSON), 11 engine address,
--   12 KV address, 13 fingerprint, 14 sequences in a batch, 15 tokens of KV cache, 16, 17 us a prompt token and a step
local id, model, role, now = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[6])

local peer = live_peer(id, model, oldest_beat(now, tonumber(ARGV[7])))
if peer then -- all live workers of a model are alike, so that one of them speaks for all
  local theirs = redis.call('HMGET', worker_key(peer), 'digest', 'layout')
  if theirs[1] ~= ARGV[4] then return { 'digest', peer, theirs[1] } end
  if theirs[2] ~= ARGV[5] then return { 'layout', peer, theirs[2] } end
end
local loaded = {}
for _, name in ipairs(cjson.decode(ARGV[9])) do loaded[name] = true end
for _, name in ipairs(redis.call('HKEYS', base .. 'adapters:' .. model)) do
  if not loaded[name] then return { 'adapter', name } end
end

drop_worker(id) -- an earlier life of this worker: its leases have nothing to give back here
local epoch = string.format('%.0f', next_epochs(ARGV[6], 1))
redis.call('HSET', worker_key(id), 'info', ARGV[10], 'caps', ARGV[8], 'digest', ARGV[4], 'layout', ARGV[5], 'load', '')
redis.call('ZADD', base .. 'beats', now, id)
put({ id = id, beat = now, per_token = tonumber(ARGV[16]), per_step = tonumber(ARGV[17]), seqs = tonumber(ARGV[14]),
  capacity = tonumber(ARGV[15]), prefill = 0, decode = 0, gen = 0, n = 0, epoch = epoch, model = model, role = role,
  home = role, fingerprint = ARGV[13], profile = profile_of(model, ARGV[8]), engine = ARGV[11], kv = ARGV[12] })
write_workers()
return { 'ok', epoch }
