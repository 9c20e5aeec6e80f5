-- Splitwise's cluster scheduler (arXiv 2311.18677, section 4) with costs in milliseconds: a prefill and a decode worker
-- together, each from its own pool while that pool's queue is short, then from the mixed pool, then by pulling a worker
-- of the other pool into mixed.

local function prefill_cost(w) return w.wait + w.pre + w.harm end
local function decode_cost(w) return w.queue + w.stall + w.move - w.bonus end
local function whole_cost(w) return w.wait + w.pre + w.harm + w.queue + w.stall - w.bonus end
local function prefill_need(w, demand) return w.fresh end
local function decode_need(w, demand) return demand.prompt + demand.new end
local function whole_need(w, demand) return w.fresh + demand.prompt + demand.new end

-- The cheapest of two lists that has room, or nil; on a tie the first. `other`: id that it must not be.
local function cheapest(lists, price, need, demand, twin)
  local best, least_ms = nil, math.huge
  for _, list in ipairs(lists) do
    for _, w in ipairs(list) do
      if price(w) < least_ms and has_room(w, need(w, demand), demand) and not (twin and w.fingerprint ~= twin) then
        best, least_ms = w, price(w)
      end
    end
  end
  return best, least_ms
end

-- The worker for one phase. `own`, `other`: lists of the phase's pool and of the opposite one; `queued` gives the
-- milliseconds that a request would wait at a worker. Returns it, and whether it is 'spilled' or 'pulled'.
local function choose(own, mixed, other, price, need, queued, demand)
  local best, least_ms = cheapest({ own }, price, need, demand)
  if best and queued(best) <= demand.spill_ms then return best, nil end
  local spare, spare_ms = cheapest({ mixed }, price, need, demand)
  local how = nil
  if spare and spare_ms < least_ms then best, least_ms, how = spare, spare_ms, #own > 0 and 'spilled' or nil end
  if not demand.moves or #own == 0 or (best and queued(best) <= demand.spill_ms) then return best, how end
  -- Only between equal fingerprints is a change of role one write.
  local pulled, pulled_ms = cheapest({ other }, price, need, demand, own[1].fingerprint)
  if pulled and pulled_ms < least_ms then
    pulled.pull = true
    return pulled, 'pulled'
  end
  return best, how
end

local function prompt_wait(w) return w.wait end
local function decode_wait(w) return w.stall end

-- Estimated ms to the first token, and from token to token.
local function promise(p, d) return (p or d).wait + (p or d).pre, d.per_step / 1000 end

-- Reserves on a worker as it was just read; one that is pulled moves into mixed, which is one write.
local function reserve(w, model, prefill, decode, gen, n)
  local key, role = worker_key(w.id), w.role
  w.prefill, w.decode, w.gen, w.n = w.prefill + prefill, w.decode + decode, w.gen + gen, w.n + n
  redis.call('HSET', key, 'prefill', w.prefill, 'decode', w.decode, 'gen', w.gen, 'n', w.n)
  if w.pull then w.role = 'mixed' end
  place(w.id, model, w.role, w.profile, w.prefill, w.decode, w.gen, w.per_token, w.per_step, w.seqs)
  if w.role ~= role then
    redis.call('HSET', key, 'role', w.role)
    unplace(w.id, model, role, w.profile)
  end
end

-- Whether a plan keeps the request's objectives (0 is none).
local function keeps(p, d, demand)
  local first, gap = promise(p, d)
  local most_first, most_gap = demand.slo_ttft or 0, demand.slo_tpot or 0
  return (most_first == 0 or first <= most_first) and (most_gap == 0 or gap <= most_gap)
end

-- The plan: prefill worker (nil when one does it all), decode worker, reason, cost in ms. Or nil.
local function plan(pools, demand)
  local whole, whole_ms = cheapest({ pools.decode, pools.mixed }, whole_cost, whole_need, demand)
  local alone, alone_ms = cheapest({ pools.prefill }, whole_cost, whole_need, demand)
  if demand.whole then return nil, whole or alone, 'whole', whole and whole_ms or alone_ms end
  if #pools.decode + #pools.mixed == 0 then return nil, alone, 'no_decode_worker', alone_ms end
  if #pools.prefill + #pools.mixed == 0 then return nil, whole, 'no_prefill_worker', whole_ms end
  if not demand.moves then alone = nil end -- a prefill worker decodes only where nobody else could
  local p, p_how = choose(pools.prefill, pools.mixed, pools.decode, prefill_cost, prefill_need, prompt_wait, demand)
  local d, d_how = choose(pools.decode, pools.mixed, pools.prefill, decode_cost, decode_need, decode_wait, demand)
  if not p or not d then return nil, whole or alone, 'whole_spilled', whole and whole_ms or alone_ms end
  if p.id == d.id or (p.role == 'mixed' and d.role == 'mixed') then -- one mixed worker does both
    if p.id == d.id and has_room(p, whole_need(p, demand), demand) and whole_cost(p) <= whole_ms then
      return nil, p, 'mixed', whole_cost(p)
    elseif whole then
      return nil, whole, 'mixed', whole_ms
    end
  end
  if p.id == d.id then return nil, alone, 'whole_spilled', alone_ms end
  local split_ms, how = prefill_cost(p) + decode_cost(d), p_how or d_how
  if demand.auto and whole then
    local split_keeps, whole_keeps, cheaper = keeps(p, d, demand), keeps(nil, whole, demand), whole_ms < split_ms
    if split_keeps ~= whole_keeps then cheaper = whole_keeps end -- an objective that only one plan keeps decides
    if cheaper then return nil, whole, 'whole_cheaper', whole_ms end
  end
  return p, d, how and 'split_' .. how or 'split', split_ms
end

-- What is short when there is no plan: the phase, its worker with the fewest pending tokens, and the ms in which it will
-- have worked off what is too much.
local function shortage(pools, demand)
  local phase, least, need = nil, nil, nil
  for _, each in ipairs({ { 'decode', decode_need }, { 'prefill', prefill_need } }) do
    for _, list in ipairs({ pools[each[1]], pools.mixed }) do
      for _, w in ipairs(list) do
        local first = not least or (phase == each[1] and pending_on(w) < pending_on(least))
        if first and not has_room(w, each[2](w, demand), demand) then phase, least, need = each[1], w, each[2](w, demand) end
      end
    end
  end
  if not least then -- there is room for each phase, but not for both on one worker; or it is not this request's turn
    least = (pools.decode[1] or pools.mixed[1] or pools.prefill[1])
    phase, need = 'mixed', whole_need(least, demand)
  end
  local work = work_ms(least.prefill, least.gen, least.per_token, least.per_step, least.seqs)
  local excess = math.max(0, pending_on(least) + need - demand.limit)
  return phase, least, work * math.min(1, excess / math.max(1, pending_on(least)))
end
