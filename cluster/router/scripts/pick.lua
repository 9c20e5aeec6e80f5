-- Who could serve a request, and what it would cost there in milliseconds. `demand`: model, needs (list), excluded,
-- held (id -> epoch and prompt tokens in its KV cache), session (a worker id or nil), prompt, new (tokens of all samples),
-- samples, oldest (ms of the last acceptable heartbeat), limit (pending tokens), and the weights named in `cost`.
local LOOK = { 'epoch', 'beat', 'role', 'home', 'fingerprint', 'profile', 'prefill', 'decode', 'gen', 'n', 'per_token',
  'per_step', 'seqs', 'capacity' }
local FEW = 2 -- of the least loaded, from each set of workers

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

-- Profiles that fit: all of them where nothing is needed.
local function fitting(demand)
  local all, fit = redis.call('HGETALL', profiles_key(demand.model)), {}
  for i = 1, #all, 2 do
    if capable(all[i + 1], demand.needs) then fit[all[i]] = true end
  end
  return fit
end

-- Estimates for a worker, in ms: `wait` until a prompt starts there, `pre` for the part of it that is not cached, `harm`
-- to requests that decode there while it is computed, `queue` of decoding work, `stall` for want of a batch slot or of
-- KV blocks, `move` for bringing the KV that it lacks. A worker whose business is decoding always has a neighbour.
local function cost(w, demand)
  local held = demand.held[w.id]
  local cached = held and held[1] == w.epoch and math.max(0, math.min(held[2], demand.prompt - 1)) or 0
  local fresh, step, n = demand.prompt - cached, w.per_step / 1000, w.n
  w.fresh = fresh
  w.wait, w.pre = w.prefill * w.per_token / 1000, fresh * w.per_token / 1000
  w.harm = demand.gap_weight * math.max(n, w.home == 'decode' and 1 or 0) * w.pre
  w.queue = w.gen * step / w.seqs
  local slots = math.max(0, n + demand.samples - w.seqs)
  local blocks = w.capacity > 0 and math.max(0, w.decode + demand.prompt + demand.new - w.capacity) or 0
  w.stall = n > 0 and (slots * w.gen / n / w.seqs + blocks / n) * step or 0
  w.move = demand.handoff_ms + fresh * demand.handoff_us / 1000
  w.bonus = demand.session == w.id and demand.slack_ms or 0
end

-- The worker as a candidate, or nil, and then whether it is dead or lost. A dead one is forgotten: it is met once, and
-- registers again if it lives.
local function look(id, demand, fit)
  local f = redis.call('HMGET', worker_key(id), unpack(LOOK))
  if not f[1] then return nil, true end
  if demand.excluded[id] or f[3] == 'draining' or not fit[f[6]] then return nil end
  if tonumber(f[2]) < demand.oldest then
    drop_worker(id)
    return nil, true
  end
  local w = { id = id, epoch = f[1], role = f[3], home = f[4], fingerprint = f[5], profile = f[6], prefill = tonumber(f[7]),
    decode = tonumber(f[8]), gen = tonumber(f[9]), n = tonumber(f[10]), per_token = tonumber(f[11]),
    per_step = tonumber(f[12]), seqs = tonumber(f[13]), capacity = tonumber(f[14]) }
  cost(w, demand)
  return w
end

local function pending_on(w) return w.prefill + w.decode end

-- An idle worker takes any request, a busy one no more than the limit.
local function has_room(w, tokens, demand)
  local pending = pending_on(w)
  return pending == 0 or pending + tokens <= demand.limit
end
