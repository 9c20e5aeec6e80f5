-- Admits a request: its tenant's limits, its turn, then the plan; reserves the tokens and writes a lease, or says why not.
-- ARGV: 1 lease id, 2 request id, 3 model, 4 prompt tokens, 5 new tokens of one sample, 6 samples, 7 now (ms),
--   8 lease (ms), 9 worker ttl (ms), 10 what the request asks for (JSON), 11 limits and weights of `pick` and `plan` (JSON)
-- Asked for: needs, excluded, spared (how many), held, session, class, whole, urgent, slo_ttft, slo_tpot, tenant, and of
-- its place in the queue: entry, patient (it may wait), queued (it waits already), score.
local lease_id, request, model, new, samples, now =
  ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local lease_key = base .. 'lease:' .. lease_id
local known = redis.call('HGET', lease_key, 'reply')
if known then return { 'ok', known } end -- a repeated call: the first one got through

local demand = cjson.decode(ARGV[10])
for name, value in pairs(cjson.decode(ARGV[11])) do demand[name] = value end
demand.model, demand.samples, demand.prompt, demand.new = model, samples, tonumber(ARGV[4]), samples * new
demand.oldest = oldest_beat(now, tonumber(ARGV[9]))
local session, tenant, entry, class = demand.session, demand.tenant, demand.entry, model .. ':' .. demand.class
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

local own = p or d -- who prefills
for _, w in ipairs({ own, d }) do
  if w.pull then pull(w, model) end
end
if p then charge(p.id, p.epoch, p.fresh, 0, 0, 0) end
charge(d.id, d.epoch, p and 0 or d.fresh, tokens, demand.new, samples)
enter_tenant(tenant, now, tokens, false)
dequeue(class, tenant.name, entry, tokens, tenant.weight)
if session then remember(session, d.id, now + demand.session_ms) end
explain(demand.kept, request, now, reason, (p and p.id .. ' ' or '') .. d.id, cost_ms, pools)

local epoch, expires = next_epoch(ARGV[7]), now + tonumber(ARGV[8])
local function address(w)
  local at = redis.call('HMGET', worker_key(w.id), 'engine', 'kv')
  return { w.id, w.epoch, at[1], at[2] }
end
local reply = cjson.encode({ epoch = epoch, reason = reason, expires = expires, p = p and address(p) or false,
  d = address(d), ms = { first, gap, cost_ms } })
redis.call('HSET', lease_key, 'request', request, 'epoch', epoch, 'reply', reply, 'p', own.id, 'pe', own.epoch,
  'pt', own.fresh, 'd', d.id, 'de', d.epoch, 'dt', demand.prompt, 'g', new, 'n', samples, 'left', samples,
  'tenant', limited(tenant) and tenant.name or '', 'used', 0)
redis.call('ZADD', base .. 'leases', expires, lease_id)
return { 'ok', reply }
