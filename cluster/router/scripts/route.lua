-- Admits a request: its tenant's limits, its turn, then the plan; reserves the tokens and writes a lease, or says why not.
-- ARGV: 1 lease id, 2 request id, 3 model, 4 prompt tokens, 5 new tokens of one sample, 6 samples, 7 now (ms),
--   8 lease (ms), 9 worker ttl (ms), 10 what else it asks for (JSON, or empty), 11 the rules, packed in the order in
--   which `demand` takes them, 12 its name in the queue
-- Else: needs, class (the same as text), excluded, spared (how many), held, whole, session, urgent (it was admitted
-- before), slo_ttft, slo_tpot, tenant, and of its place in the queue: patient (it may wait), queued, score.
local lease_id, request, model, now = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[7])
local known = lease(lease_id)
if known then return { 'ok', known.reply } end -- a repeated call: the first one got through

local prompt, new, samples = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local ask = ARGV[10] == '' and {} or cjson.decode(ARGV[10])
local auto, moves, limit, max_queue, spill_ms, gap_weight, handoff_ms, handoff_us, slack_ms, session_ms, kept =
  struct.unpack('>ddddddddddd', ARGV[11])
local demand = { model = model, prompt = prompt, new = samples * new, samples = samples, needs = ask.needs or {},
  excluded = ask.excluded or {}, spared = ask.spared or 0, held = ask.held or {}, whole = ask.whole,
  session = ask.session and redis.call('HGET', base .. 'sessions', ask.session) or nil, slo_ttft = ask.slo_ttft or 0,
  slo_tpot = ask.slo_tpot or 0, auto = auto == 1, moves = moves == 1, limit = limit, spill_ms = spill_ms,
  gap_weight = gap_weight, handoff_ms = handoff_ms, handoff_us = handoff_us, slack_ms = slack_ms,
  oldest = oldest_beat(now, tonumber(ARGV[9])) }
local entry, class, tokens = ARGV[12], model .. ':' .. (ask.class or ''), prompt + samples * new
local tenant = ask.tenant or ANYONE

local function refuse(verdict, chosen, ms, pools, ...)
  dequeue(class, tenant.name, entry, 0, 1)
  explain(kept, request, now, verdict, chosen, ms, pools)
  return { verdict, ... }
end

local short, short_ms = enter_tenant(tenant, now, tokens, true)
if short then return refuse('limited', short, short_ms, nil, short, math.ceil(short_ms)) end

local turn = not ask.urgent and head(class, now) or nil -- nil: nobody waits that would be before this one
if ask.queued or (turn and turn ~= entry and ask.patient and waiting(class) < max_queue) then
  enqueue(class, tenant.name, entry, ask.score, now)
  turn = head(class, now)
  if turn ~= entry then return { 'after' } end
end
local pools = short_list(demand, fitting(demand))
local p, d, reason, cost_ms
if not turn or turn == entry then p, d, reason, cost_ms = plan(pools, demand) end
if not d then
  if #pools.prefill + #pools.decode + #pools.mixed == 0 then return refuse('none', '', 0, nil) end
  if ask.patient and (ask.queued or waiting(class) < max_queue) then
    enqueue(class, tenant.name, entry, ask.score, now)
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

explain(kept, request, now, reason, (p and p.id .. ' ' or '') .. d.id, cost_ms, pools)
if p then add_work(p, p.pull and 'mixed' or p.role, p.fresh, 0, 0, 0) end
add_work(d, d.pull and 'mixed' or d.role, p and 0 or d.fresh, tokens, demand.new, samples)
enter_tenant(tenant, now, tokens, false)
if turn then dequeue(class, tenant.name, entry, tokens, tenant.weight) end
if ask.session then remember(ask.session, d.id, now + session_ms) end

local epoch, expires = next_epoch(ARGV[7]), now + tonumber(ARGV[8])
local function address(w) return w.id .. '\n' .. w.epoch .. '\n' .. w.engine .. '\n' .. w.kv end
local reply = table.concat({ epoch, reason, expires, first, gap, address(d), p and address(p) }, '\n')
local own = p or d -- who prefills
open_lease({ id = lease_id, released = 0, ended = 0, used = 0, fresh = own.fresh, prompt = prompt, new = new, n = samples,
  request = request, epoch = epoch, p = own.id, p_epoch = own.epoch, d = d.id, d_epoch = d.epoch,
  tenant = limited(tenant) and tenant.name or '', reply = reply }, expires)
return { 'ok', reply }
