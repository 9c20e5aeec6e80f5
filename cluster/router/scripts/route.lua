-- Admits requests, one after another, all in one call: for each its tenant's limits, its turn, then the plan; reserves the
-- tokens and writes a lease, or says why not. Each sees what those before it have taken, as if it had come by itself.
-- ARGV: 1 now (ms), 2 lease (ms), 3 worker ttl (ms), 4 the rules, packed in the order in which they are taken below, then
--   of each request: lease id, request id, model, prompt tokens, new tokens of one sample, samples, what else it asks for
--   (JSON, or empty), its name in the queue.
-- Else: needs, class (the same as text), excluded, spared (how many), held, whole, session, urgent (it was admitted
-- before), slo_ttft, slo_tpot, tenant, and of its place in the queue: patient (it may wait for room), wakes (it may wait
-- for a worker, where pools may be at zero), queued, score.
-- Returns an answer for each: a verdict, and what belongs to it; with 'after', 'none' where no worker is there.
local FIRST, EACH = 5, 8
local now, lease_ms, oldest = tonumber(ARGV[1]), tonumber(ARGV[2]), oldest_beat(tonumber(ARGV[1]), tonumber(ARGV[3]))
local auto, moves, limit, max_queue, spill_ms, gap_weight, handoff_ms, handoff_us, slack_ms, session_ms, kept =
  struct.unpack('>ddddddddddd', ARGV[4])
local NOTHING = {}
local demand = { auto = auto == 1, moves = moves == 1, limit = limit, spill_ms = spill_ms, gap_weight = gap_weight,
  handoff_ms = handoff_ms, handoff_us = handoff_us, slack_ms = slack_ms, oldest = oldest, model = '', prompt = 0, new = 0,
  samples = 0, needs = NOTHING, excluded = NOTHING, spared = 0, held = NOTHING, whole = false, session = nil,
  slo_ttft = 0, slo_tpot = 0 } -- of one request after another
local epoch -- the last that was given to a lease
local asked = {} -- models whose pools may be at zero, and that were given a lease

local function address(w) return w.id .. '\n' .. w.epoch .. '\n' .. w.engine .. '\n' .. w.kv end

local function route(lease_id, request, model, prompt, new, samples, ask, entry)
  demand.model, demand.prompt, demand.new, demand.samples = model, prompt, samples * new, samples
  demand.needs, demand.excluded, demand.spared = ask.needs or NOTHING, ask.excluded or NOTHING, ask.spared or 0
  demand.held, demand.whole = ask.held or NOTHING, ask.whole
  demand.slo_ttft, demand.slo_tpot = ask.slo_ttft or 0, ask.slo_tpot or 0
  demand.session = ask.session and redis.call('HGET', base .. 'sessions', ask.session) or nil
  local class, tokens, tenant = model .. ':' .. (ask.class or ''), prompt + samples * new, ask.tenant or ANYONE

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
    if turn ~= entry then return { 'after', next(fitting(class, demand).profiles) and 'full' or 'none' } end
  end
  local pools = short_list(demand, fitting(class, demand))
  local p, d, reason, cost_ms
  if not turn or turn == entry then p, d, reason, cost_ms = plan(pools, demand) end
  if not d then
    local nobody = #pools.prefill + #pools.decode + #pools.mixed == 0
    local willing = ask.wakes and (nobody or ask.queued) or not nobody and ask.patient
    if willing and (ask.queued or waiting(class) < max_queue) then
      enqueue(class, tenant.name, entry, ask.score, now)
      return { 'after', nobody and 'none' or 'full' }
    end
    if nobody then return refuse('none', '', 0, nil) end
    local phase, w, ms = shortage(pools, demand)
    ms = ms * (1 + waiting(class))
    return refuse('full', w.id, ms, pools, w.id, pending_on(w), phase, math.ceil(ms), waiting(class))
  end
  local first, gap = promise(p, d)
  if not keeps(p, d, demand) then
    return refuse('slo', d.id, cost_ms, pools, math.ceil(first), math.ceil(gap), math.ceil((p or d).wait))
  end

  explain(kept, request, now, reason, (p and p.id .. ' ' or '') .. d.id, cost_ms, pools)
  local own = p or d -- who prefills
  if p then add_work(p, p.pull and 'mixed' or p.role, p.fresh, 0, 0, 0) end
  add_work(d, d.pull and 'mixed' or d.role, p and 0 or d.fresh, tokens, demand.new, samples)
  enter_tenant(tenant, now, tokens, false)
  if turn then dequeue(class, tenant.name, entry, tokens, tenant.weight) end
  if ask.wakes then asked[model] = now end
  if ask.session then remember(ask.session, d.id, now + session_ms) end

  epoch = epoch and epoch + 1 or next_epochs(ARGV[1], to_come + 1)
  local life, expires = string.format('%.0f', epoch), now + lease_ms
  local reply = table.concat({ life, reason, expires, first, gap, address(d), p and address(p) }, '\n')
  open_lease({ id = lease_id, released = 0, ended = 0, used = 0, fresh = own.fresh, prompt = prompt, new = new,
    n = samples, request = request, epoch = life, p = own.id, p_epoch = own.epoch, d = d.id, d_epoch = d.epoch,
    tenant = limited(tenant) and tenant.name or '', reply = reply }, expires)
  return { 'ok', reply }
end

local keys, answers = {}, {}
for i = FIRST, #ARGV, EACH do keys[#keys + 1] = lease_key(ARGV[i]) end
local known = redis.call('MGET', unpack(keys))
for n = 1, #keys do
  local i = FIRST + (n - 1) * EACH
  to_come = #keys - n
  local mine = unpacked_lease(ARGV[i], known[n])
  answers[n] = mine and { 'ok', mine.reply } -- a repeated call: the first one got through
    or route(ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]), tonumber(ARGV[i + 5]),
      ARGV[i + 6] == '' and NOTHING or cjson.decode(ARGV[i + 6]), ARGV[i + 7])
end
for model, at in pairs(asked) do redis.call('HSET', base .. 'asked', model, at) end
write_leases()
write_workers()
return answers
