-- Shared by every script. KEYS[1]: base of all keys of one cluster ('{jw:<cluster>}:v2:'); every key below derives
-- from it, so all lie in one hash slot. Epochs are compared as the strings they are: Lua's numbers would round them.
local base = KEYS[1]

local function worker_key(id) return base .. 'worker:' .. id end

-- Workers of one role, model and profile (set of capabilities) stand in two sorted sets: `queue` by the milliseconds in
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

-- Milliseconds that a worker needs for what is pending: prompts one after another, answers at its full batch.
-- `per_token`, `per_step`: measured microseconds of a prompt token and of a decode step.
local function work_ms(prefill, gen, per_token, per_step, seqs)
  return (prefill * per_token + gen * per_step / seqs) / 1000
end

local TYPICAL_PROMPT, TYPICAL_ANSWER = 512, 256 -- tokens

local HOT = { 'epoch', 'model', 'role', 'profile', 'home', 'prefill', 'decode', 'gen', 'n', 'per_token', 'per_step', 'seqs' }

-- Puts a worker into the sets of a role, by what is pending on it and how fast it is.
local function place(id, model, role, profile, prefill, decode, gen, per_token, per_step, seqs)
  local done = work_ms(prefill + TYPICAL_PROMPT, gen + TYPICAL_ANSWER, per_token, per_step, seqs)
  redis.call('ZADD', set_key('queue', role, profile, model), done, id)
  redis.call('ZADD', set_key('room', role, profile, model), prefill + decode, id)
end

-- Takes a worker out of the sets of a role. A profile that nobody has any more is forgotten.
local function unplace(id, model, role, profile)
  redis.call('ZREM', set_key('queue', role, profile, model), id)
  redis.call('ZREM', set_key('room', role, profile, model), id)
  local held = redis.call('EXISTS', set_key('room', 'prefill', profile, model), set_key('room', 'decode', profile, model),
    set_key('room', 'mixed', profile, model))
  if held == 0 then redis.call('HDEL', profiles_key(model), profile) end
end

-- Adds to (or takes from) what is pending on a worker; one that is gone or has started anew owes nothing.
-- A worker that Splitwise's scheduler pulled into mixed goes home when no work of the other phase is left.
local function charge(id, epoch, prefill, decode, gen, n)
  local w = redis.call('HMGET', worker_key(id), unpack(HOT))
  if w[1] ~= epoch then return end
  prefill, decode, gen, n = w[6] + prefill, w[7] + decode, w[8] + gen, w[9] + n
  redis.call('HSET', worker_key(id), 'prefill', prefill, 'decode', decode, 'gen', gen, 'n', n)
  local role = w[3]
  if role == 'draining' then return end
  if role == 'mixed' and ((w[5] == 'prefill' and decode == 0) or (w[5] == 'decode' and prefill == 0)) then
    role = w[5]
    redis.call('HSET', worker_key(id), 'role', role)
  end
  place(id, w[2], role, w[4], prefill, decode, gen, w[10], w[11], w[12])
  if role ~= w[3] then unplace(id, w[2], w[3], w[4]) end
end

-- Forgets a worker. Leases on it stay until they are settled or expire, and then find nothing to give back.
local function drop_worker(id)
  local w = redis.call('HMGET', worker_key(id), 'model', 'role', 'profile')
  if w[1] and w[2] ~= 'draining' then unplace(id, w[1], w[2], w[3]) end
  redis.call('ZREM', base .. 'beats', id)
  return redis.call('DEL', worker_key(id))
end
