-- Picks prefill and decode worker together, reserves their tokens and writes a lease, or says why it cannot.
-- Splitwise's cluster scheduler (arXiv 2311.18677, section 4): join-the-shortest-queue on pending tokens.
-- ARGV: 1 lease id, 2 request id, 3 model, 4 prompt tokens, 5 new tokens, 6 whole '1'/'0', 7 now (ms),
--   8 lease (ms), 9 worker ttl (ms), 10 pending tokens a worker may have, 11 needs, 12 excluded (JSON lists)
local lease_id, model, prompt, new = ARGV[1], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local now, limit = tonumber(ARGV[7]), tonumber(ARGV[10])
local lease_key = base .. 'lease:' .. lease_id
local known = redis.call('HGET', lease_key, 'reply')
if known then return { 'ok', known } end -- a repeated call: the first one got through

local demand = { model = model, needs = cjson.decode(ARGV[11]), excluded = cjson.decode(ARGV[12]),
  oldest = now - tonumber(ARGV[9]) }
local prefill, mixed, decode = shortest('prefill', demand), shortest('mixed', demand), shortest('decode', demand)
local p, d, reason = lesser(prefill, mixed), lesser(decode, mixed), 'split'
if not p and not d then return { 'none' } end
if ARGV[6] == '1' then
  p, d, reason = nil, d or p, 'whole'
elseif not p then
  reason = 'no_prefill_worker'
elseif not d then
  p, d, reason = nil, p, 'no_decode_worker'
elseif p.id == d.id then
  p, reason = nil, 'mixed'
end

local first = p or d -- who prefills
local own = p and prompt + new or 2 * prompt + new -- what comes upon d in all
for _, pair in ipairs({ { p, prompt, 'prefill' }, { d, own, 'decode' } }) do
  local worker = pair[1]
  if worker and worker.pending > 0 and worker.pending + pair[2] > limit then
    return { 'full', worker.id, worker.pending, pair[2], pair[3], worker.load or '' }
  end
end
reserve(first, model, 'prefill', prompt)
reserve(d, model, 'decode', prompt + new)

local epoch, expires = next_epoch(ARGV[7]), now + tonumber(ARGV[8])
local function ref(w) return w and { w.id, w.epoch, w.engine, w.kv } or false end
local reply = cjson.encode({ epoch = epoch, reason = reason, expires = expires, p = ref(p), d = ref(d) })
redis.call('HSET', lease_key, 'request', ARGV[2], 'epoch', epoch, 'reply', reply,
  'p', first.id, 'pe', first.epoch, 'pt', prompt, 'd', d.id, 'de', d.epoch, 'dt', prompt + new)
redis.call('ZADD', base .. 'leases', expires, lease_id)
return { 'ok', reply }
