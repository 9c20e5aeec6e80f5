-- Admits a request: its tenant's limits, its turn, then the plan; reserves the tokens and writes a lease, or says why not.
-- ARGV: 1 lease id, 2 request id, 3 model, 4 prompt tokens, 5 new tokens of one sample, 6 samples, 7 now (ms),
--   8 lease (ms), 9 worker ttl (ms), 10 what else it asks for (JSON, or empty), 11 to 20 and 22 the rules, as
--   named below, 21 its name in the queue
-- Else: needs, class (the same as text), excluded, spared (how many), held, whole, session, urgent (it was admitted
-- before), slo_ttft, slo_tpot, tenant, and of its place in the queue: patient (it may wait), queued, score.
local lease_id, request, model, new, samples, now =
  ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local lease_key = base .. 'lease:' .. lease_id
local known = redis.call('HGET', lease_key, 'reply')
if known then return { 'ok', known } end -- a repeated call: the first one got through

local demand = ARGV[10] == '' and {} or cjson.decode(ARGV[10])
demand.auto, demand.limit, demand.max_queue, demand.spill_ms, demand.gap_weight, demand.handoff_ms, demand.handoff_us,
  demand.slack_ms, demand.session_ms, demand.kept = ARGV[11] == '1', tonumber(ARGV[12]), tonumber(ARGV[13]),
  tonumber(ARGV[14]), tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17]), tonumber(ARGV[18]), ARGV[19],
  tonumber(ARGV[20])
demand.moves = ARGV[22] == '1'
demand.model, demand.samples, demand.prompt, demand.new = model, samples, tonumber(ARGV[4]), samples * new
demand.needs, demand.excluded, demand.held = demand.needs or {}, demand.excluded or {}, demand.held or {}
demand.oldest = oldest_beat(now, tonumber(ARGV[9]))
local session, entry, class = demand.session, ARGV[21], model .. ':' .. (demand.class or '')
local tenant = demand.tenant or { name = '*', rpm = 0, tpm = 0, concurrent = 0, weight = 1 }
demand.session = session and redis.call('HGET', base .. 'sessions', session) or nil
local tokens = demand.prompt + demand.new

local function refuse(verdict, chosen, ms, pools, ...)
  dequeue(class, tenant.name, entry, 0, 1)
  explain(demand.kept, request, now, verdict, chosen, ms, pools)
  return { verdict, ... }
end

local short, short_ms = enter_tenant(tenant, now, tokens, true)
if short then return refuse('limited', short, short_ms, nil, short, math.ceil(short_ms)) end

local turn = not demand.urgent and head(class, now) or entry
if demand.queued or (turn and turn ~= entry and demand.patient and waiting(class) < demand.max_queue) then
  enqueue(class, tenant.name, entry, demand.score, now)
  turn = head(class, now)
  if turn ~= entry then return { 'after' } end
end
local pools = short_list(demand, fitting(demand))
local p, d, reason, cost_ms
if not turn or turn == entry then p, d, reason, cost_ms = plan(pools, demand) end
if not d then
  if #pools.prefill + #pools.decode + #pools.mixed == 0 then return refuse('none', '', 0, nil) end
  if demand.patient and (demand.queued or waiting(class) < demand.max_queue) then
    enqueue(class, tenant.name, entry, demand.score, now)
    return { 'after' }
  end
  local phase, w, ms = shortage(pools, demand)
  ms = ms * (1 + waiting(class))
  return refuse('full', w.id, ms, pools, w.id, pending_on(w), phase, math.ceil(ms), waiting(class))
end
local first, gap = promise(p, d)
if not keeps(p, d, demand) then
  return refuse('slo', d.id, cost_ms, pools, math.ceil(first), math.ceil(gap), math.ceil((p or d).wait))
end

explain(demand.kept, request, now, reason, (p and p.id .. ' ' or '') .. d.id, cost_ms, pools)
if p then reserve(p, model, p.fresh, 0, 0, 0) end
reserve(d, model, p and 0 or d.fresh, tokens, demand.new, samples)
enter_tenant(tenant, now, tokens, false)
dequeue(class, tenant.name, entry, tokens, tenant.weight)
if session then remember(session, d.id, now + demand.session_ms) end

local epoch, expires = next_epoch(ARGV[7]), now + tonumber(ARGV[8])
local function address(w)
  local at = redis.call('HMGET', worker_key(w.id), 'engine', 'kv')
  return w.id .. '\n' .. w.epoch .. '\n' .. at[1] .. '\n' .. at[2]
end
local reply = table.concat({ epoch, reason, expires, first, gap, address(d), p and address(p) }, '\n')
local own = p or d -- who prefills
redis.call('HSET', lease_key, 'request', request, 'epoch', epoch, 'reply', reply, 'p', own.id, 'pe', own.epoch,
  'pt', own.fresh, 'd', d.id, 'de', d.epoch, 'dt', demand.prompt, 'g', new, 'n', samples, 'left', samples,
  'tenant', limited(tenant) and tenant.name or '', 'used', 0)
redis.call('ZADD', base .. 'leases', expires, lease_id)
return { 'ok', reply }
