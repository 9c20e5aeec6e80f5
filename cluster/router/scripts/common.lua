-- Shared by every script. KEYS[1]: base of all keys of one cluster ('{jw:<cluster>}:v3:'); every key below derives
-- from it, so all lie in one hash slot. Epochs are compared as the strings they are: Lua's numbers would round them.
local base = KEYS[1]
local workers = base .. 'workers'

-- What a worker is routed by: one packed string in the hash `workers`, so that a decision reads all its candidates in
-- one call. Numbers: last heartbeat (ms), microseconds of a prompt token and of a decode step, sequences in a batch,
-- tokens of KV cache, and what is pending: prompt tokens, KV tokens, tokens to generate, sequences. `home`: the role
-- it was given; `role`: the one it has.
local STATE = '>ddddddddd ssssssss'

-- The book of this call. Nobody else writes meanwhile, so what it reads it reads once, and what it changes it writes once,
-- at its end (`load.lua`), however many decisions it makes. `book`: workers by id (false: there is none); `changed`: those
-- to be written; `starts`: the first of a sorted set as it will be, by key (`pools.lua`).
local book, changed, starts = {}, {}, {}

-- The fields after `kv` belong to one decision (`pick.lua`, `pools.lua`): named here, a table is made in its full size. They
-- are 32: with one more, Lua makes room for 64.
local function unpacked(id, state)
  local beat, per_token, per_step, seqs, capacity, prefill, decode, gen, n, epoch, model, role, home, fingerprint, profile,
    engine, kv = struct.unpack(STATE, state)
  return { id = id, beat = beat, per_token = per_token, per_step = per_step, seqs = seqs, capacity = capacity,
    prefill = prefill, decode = decode, gen = gen, n = n, epoch = epoch, model = model, role = role, home = home,
    fingerprint = fingerprint, profile = profile, engine = engine, kv = kv, fresh = 0, wait = 0, pre = 0, harm = 0,
    queue = 0, stall = 0, move = 0, prefill_ms = 0, decode_ms = 0, whole_ms = 0, room = 0, pull = false, seen = false,
    listed = false }
end

-- Reads those of these workers that are not in the book yet, all in one call.
local function read_workers(ids)
  local missing = {}
  for _, id in ipairs(ids) do
    if book[id] == nil then missing[#missing + 1] = id end
  end
  if #missing == 0 then return end
  for i, state in ipairs(redis.call('HMGET', workers, unpack(missing))) do
    book[missing[i]] = state and unpacked(missing[i], state)
  end
end

-- A registered worker, or nil.
local function worker(id)
  if book[id] == nil then
    local state = redis.call('HGET', workers, id)
    book[id] = state and unpacked(id, state)
  end
  return book[id] or nil
end

local function worker_key(id) return base .. 'worker:' .. id end

-- Workers of one role, model and profile (set of capabilities) stand in two sorted sets: `queue` by the microseconds in
-- which they would be done with a typical request, `room` by pending tokens.
local function set_key(kind, role, profile, model) return base .. kind .. ':' .. role .. ':' .. profile .. ':' .. model end
local function profiles_key(model) return base .. 'profiles:' .. model end

-- Takes so many epochs; returns the first, as a number. The counter starts at the time (us), so that epochs stay unique
-- when Redis loses its data.
local function next_epochs(now_ms, count)
  local last = redis.call('INCRBY', base .. 'epoch', count)
  if last == count then
    last = now_ms * 1000 + count
    redis.call('SET', base .. 'epoch', string.format('%.0f', last))
  end
  return last - count + 1
end
