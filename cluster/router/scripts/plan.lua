-- Splitwise's cluster scheduler (arXiv 2311.18677, section 4) with costs in milliseconds: a prefill and a decode worker
-- together, each from its own pool while that pool's queue is short, then from the mixed pool, then by pulling a worker
-- of the other pool into mixed.

-- The cheapest worker of a list that has room for a part of the request (`pick.lua`), and its cost; or nil. On a tie the
-- first. `twin`: fingerprint that it must have. `than`: a worker that it must be cheaper than, and that one's cost.
local PRICE = { prefill = 'prefill_ms', decode = 'decode_ms', whole = 'whole_ms' }

local function cheapest(part, demand, list, than, than_ms, twin)
  local price, best, least_ms = PRICE[part], than, than_ms or math.huge
  for _, w in ipairs(list) do
    if w[price] < least_ms and (not twin or w.fingerprint == twin) and fits_in(w, part, demand) then
      best, least_ms = w, w[price]
    end
  end
  return best, least_ms
end

-- The worker for one phase. `own`, `other`: lists of the phase's pool and of the opposite one; `queued` names the
-- milliseconds that a request would wait at a worker. Returns it, and whether it is 'spilled' or 'pulled'.
local function choose(phase, own, mixed, other, queued, demand)
  local best, least_ms = cheapest(phase, demand, own)
  if best and best[queued] <= demand.spill_ms then return best, nil end
  local spare, spare_ms = cheapest(phase, demand, mixed, best, least_ms)
  local how = spare ~= best and #own > 0 and 'spilled' or nil
  if not demand.moves or #own == 0 or (spare and spare[queued] <= demand.spill_ms) then return spare, how end
  -- Only between equal fingerprints is a change of role one write.
  local pulled = cheapest(phase, demand, other, spare, spare_ms, own[1].fingerprint)
  if pulled ~= spare then
    pulled.pull = true
    return pulled, 'pulled'
  end
  return spare, how
end

-- Estimated ms to the first token, and from token to token.
local function promise(p, d) return (p or d).wait + (p or d).pre, d.per_step / 1000 end

-- Whether a plan keeps the request's objectives (0 is none).
local function keeps(p, d, demand)
  local first, gap = promise(p, d)
  local most_first, most_gap = demand.slo_ttft or 0, demand.slo_tpot or 0
  return (most_first == 0 or first <= most_first) and (most_gap == 0 or gap <= most_gap)
end

-- The plan: prefill worker (nil when one does it all), decode worker, reason, cost in ms. Or nil.
local function plan(pools, demand)
  local whole, whole_ms = cheapest('whole', demand, pools.mixed, cheapest('whole', demand, pools.decode))
  local alone, alone_ms = cheapest('whole', demand, pools.prefill)
  if demand.whole then return nil, whole or alone, 'whole', whole and whole_ms or alone_ms end
  if #pools.decode + #pools.mixed == 0 then return nil, alone, 'no_decode_worker', alone_ms end
  if #pools.prefill + #pools.mixed == 0 then return nil, whole, 'no_prefill_worker', whole_ms end
  if not demand.moves then alone = nil end -- a prefill worker decodes only where nobody else could
  local p, p_how = choose('prefill', pools.prefill, pools.mixed, pools.decode, 'wait', demand)
  local d, d_how = choose('decode', pools.decode, pools.mixed, pools.prefill, 'stall', demand)
  if not p or not d then return nil, whole or alone, 'whole_spilled', whole and whole_ms or alone_ms end
  if p == d or (p.role == 'mixed' and d.role == 'mixed') then -- one mixed worker does both
    if p == d and fits_in(p, 'whole', demand) and p.whole_ms <= whole_ms then
      return nil, p, 'mixed', p.whole_ms
    elseif whole then
      return nil, whole, 'mixed', whole_ms
    end
  end
  if p == d then return nil, alone, 'whole_spilled', alone_ms end
  local split_ms, how = p.prefill_ms + d.decode_ms, p_how or d_how
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
  for _, part in ipairs({ 'decode', 'prefill' }) do
    for _, list in ipairs({ pools[part], pools.mixed }) do
      for _, w in ipairs(list) do
        local first = not least or (phase == part and pending_on(w) < pending_on(least))
        if first and not fits_in(w, part, demand) then
          phase, least, need = part, w, part == 'prefill' and w.fresh or demand.prompt + demand.new
        end
      end
    end
  end
  if not least then -- there is room for each phase, but not for both on one worker; or it is not this request's turn
    least = (pools.decode[1] or pools.mixed[1] or pools.prefill[1])
    phase, need = 'mixed', least.fresh + demand.prompt + demand.new
  end
  local excess = math.max(0, pending_on(least) + need - demand.limit)
  return phase, least, work_us(least, 0, 0) / 1000 * math.min(1, excess / math.max(1, pending_on(least)))
end
