-- Shared by every script. KEYS[1]: base of all keys of one cluster ('{jw:<cluster>}:v3:'); every key below derives
-- from it, so all lie in one hash slot. Epochs are compared as the strings they are: Lua's numbers would round them.
local base = KEYS[1]
local workers = base .. 'workers'

-- What a worker is routed by: one packed string in the hash `workers`, so that a decision reads all its candidates in
-- one call. Numbers: last heartbeat (ms), microseconds of a prompt token and of a decode step, sequences in a batch,
-- tokens of KV cache, and what is pending: prompt tokens, KV tokens, tokens to generate, sequences. `home`: the role
-- it was given; `role`: the one it has.
local STATE = '>ddddddddd ssssssss'

local function unpacked(id, state)
  local beat, per_token, per_step, seqs, capacity, prefill, decode, gen, n, epoch, model, role, home, fingerprint, profile,
    engine, kv = struct.unpack(STATE, state)
  return { id = id, beat = beat, per_token = per_token, per_step = per_step, seqs = seqs, capacity = capacity,
    prefill = prefill, decode = decode, gen = gen, n = n, epoch = epoch, model = model, role = role, home = home,
    fingerprint = fingerprint, profile = profile, engine = engine, kv = kv }
end

-- A registered worker, or nil.
local function worker(id)
  local state = redis.call('HGET', workers, id)
  return state and unpacked(id, state) or nil
end

local function worker_key(id) return base .. 'worker:' .. id end

-- Workers of one role, model and profile (set of capabilities) stand in two sorted sets: `queue` by the microseconds in
-- which they would be done with a typical request, `room` by pending tokens.
local function set_key(kind, role, profile, model) return base .. kind .. ':' .. role .. ':' .. profile .. ':' .. model end
local function profiles_key(model) return base .. 'profiles:' .. model end

-- The next epoch. The counter starts at the time (us), so that epochs stay unique when Redis loses its data.
local function next_epoch(now_ms)
  local epoch = redis.call('INCR', base .. 'epoch')
  if epoch == 1 then
    epoch = now_ms * 1000 + 1
    redis.call('SET', base .. 'epoch', string.format('%.0f', epoch))
  end
  return string.format('%.0f', epoch)
end

-- Microseconds that a worker needs for what is pending and so much more: prompts one after another, answers at its full
-- batch.
local function work_us(w, prefill, gen) return (w.prefill + prefill) * w.per_token + (w.gen + gen) * w.per_step / w.seqs end

local TYPICAL_PROMPT, TYPICAL_ANSWER = 512, 256 -- tokens

-- Writes a worker's state, and puts it into the sets of its role; one that is draining stands in none.
local function put(w)
  redis.call('HSET', workers, w.id, struct.pack(STATE, w.beat, w.per_token, w.per_step, w.seqs, w.capacity, w.prefill,
    w.decode, w.gen, w.n, w.epoch, w.model, w.role, w.home, w.fingerprint, w.profile, w.engine, w.kv))
  if w.role == 'draining' then return end
  local place = w.role .. ':' .. w.profile .. ':' .. w.model
  redis.call('ZADD', base .. 'queue:' .. place, math.floor(work_us(w, TYPICAL_PROMPT, TYPICAL_ANSWER)), w.id)
  redis.call('ZADD', base .. 'room:' .. place, w.prefill + w.decode, w.id)
end

-- Takes a worker out of the sets of a role. A profile that nobody has any more is forgotten.
local function unplace(id, model, role, profile)
  redis.call('ZREM', set_key('queue', role, profile, model), id)
  redis.call('ZREM', set_key('room', role, profile, model), id)
  local held = redis.call('EXISTS', set_key('room', 'prefill', profile, model), set_key('room', 'decode', profile, model),
    set_key('room', 'mixed', profile, model))
  if held == 0 then redis.call('HDEL', profiles_key(model), profile) end
end

-- Adds to (or takes from) what is pending on a worker that was just read. One that Splitwise's scheduler pulled into
-- mixed goes home when no work of the other phase is left. `role`: what it shall be from now on.
local function add_work(w, role, prefill, decode, gen, n)
  local from = w.role
  w.prefill, w.decode, w.gen, w.n = w.prefill + prefill, w.decode + decode, w.gen + gen, w.n + n
  if role == 'mixed' and ((w.home == 'prefill' and w.decode == 0) or (w.home == 'decode' and w.prefill == 0)) then
    role = w.home
  end
  w.role = role
  put(w)
  if from ~= role and from ~= 'draining' then unplace(w.id, w.model, from, w.profile) end
end

-- The same for one that was known in a life; one that is gone or has started anew owes nothing.
local function charge(id, epoch, prefill, decode, gen, n)
  local w = worker(id)
  if w and w.epoch == epoch then add_work(w, w.role, prefill, decode, gen, n) end
end

-- Forgets a worker. Leases on it stay until they are settled or expire, and then find nothing to give back.
local function drop_worker(id)
  local w = worker(id)
  if w and w.role ~= 'draining' then unplace(id, w.model, w.role, w.profile) end
  redis.call('ZREM', base .. 'beats', id)
  redis.call('DEL', worker_key(id))
  return redis.call('HDEL', workers, id)
end
