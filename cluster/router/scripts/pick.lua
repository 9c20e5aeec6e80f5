-- Who could serve a request, and what it would cost there in milliseconds. `demand`: model, needs (list), excluded,
-- held (id -> epoch and prompt tokens in its KV cache), session (a worker id or nil), prompt, new (tokens of all samples),
-- samples, oldest (ms of the last acceptable heartbeat), limit (pending tokens), and the weights named in `cost`.
local FEW = 2 -- of the least loaded, from each set of workers
local ROLES = { 'prefill', 'decode', 'mixed' }

-- Milliseconds of the last heartbeat that still counts. In a grace (`expire.lua`) nobody is too old.
local function oldest_beat(now, ttl)
  local grace = redis.call('GET', base .. 'grace')
  return grace and tonumber(grace) >= now and -1 or now - ttl
end

-- Whether a capability text ('\n' around each) has everything that is needed.
local function capable(text, needs)
  for _, need in ipairs(needs) do
    if not string.find(text, '\n' .. need .. '\n', 1, true) then return false end
  end
  return true
end

-- What fits the requests of a class (a model with a set of needs): `profiles`, all where nothing is needed, and
-- `queues`: the sets in which their workers stand.
local fits = {}

local function fitting(class, demand)
  if not fits[class] then
    local all, profiles, queues = redis.call('HGETALL', profiles_key(demand.model)), {}, {}
    for i = 1, #all, 2 do
      if capable(all[i + 1], demand.needs) then
        profiles[all[i]] = true
        for _, role in ipairs(ROLES) do queues[#queues + 1] = set_key('queue', role, all[i], demand.model) end
      end
    end
    fits[class] = { profiles = profiles, queues = queues }
  end
  return fits[class]
end

local function pending_on(w) return w.prefill + w.decode end

-- Estimates for a worker, in ms: `wait` until a prompt starts there, `pre` for the part of it that is not cached, `harm`
-- to requests that decode there while it is computed, `queue` of decoding work, `stall` for want of a batch slot or of
-- KV blocks, `move` for bringing the KV that it lacks. A worker whose business is decoding always has a neighbour.
-- From these what each part of a request costs there (`<part>_ms`), and the `room` in tokens: an idle worker takes any
-- request, a busy one no more than the limit. Parts are prefill, decode, and whole.
local function cost(w, demand)
  local held, prompt, need, n, pending = demand.held[w.id], demand.prompt, demand.prompt + demand.new, w.n, pending_on(w)
  local cached = held and held[1] == w.epoch and math.max(0, math.min(held[2], prompt - 1)) or 0
  local fresh, step = prompt - cached, w.per_step / 1000
  local wait, pre = w.prefill * w.per_token / 1000, fresh * w.per_token / 1000
  local neighbours = n == 0 and w.home == 'decode' and 1 or n
  local harm, queue, stall = demand.gap_weight * neighbours * pre, w.gen * step / w.seqs, 0
  if n > 0 then
    local slots = n + demand.samples - w.seqs
    local blocks = w.decode + need - w.capacity
    if slots > 0 then stall = slots * w.gen / n / w.seqs * step end
    if blocks > 0 and w.capacity > 0 then stall = stall + blocks / n * step end
  end
  local move, bonus = demand.handoff_ms + fresh * demand.handoff_us / 1000, demand.session == w.id and demand.slack_ms or 0
  w.fresh, w.wait, w.pre, w.harm, w.queue, w.stall, w.move = fresh, wait, pre, harm, queue, stall, move
  w.pull, w.prefill_ms, w.decode_ms = false, wait + pre + harm, queue + stall + move - bonus
  w.whole_ms = wait + pre + harm + queue + stall - bonus
  w.room = pending == 0 and math.huge or demand.limit - pending
end

-- Whether a worker whose cost is known has room for a part of the request.
local function fits_in(w, part, demand)
  if part == 'prefill' then return w.fresh <= w.room end
  local need = demand.prompt + demand.new
  return (part == 'whole' and w.fresh + need or need) <= w.room
end

-- Takes a worker whose state was lost out of all sets where it may stand.
local function bury(id, model, profiles)
  for profile in pairs(profiles) do
    for _, role in ipairs(ROLES) do unplace(id, model, role, profile) end
  end
end
