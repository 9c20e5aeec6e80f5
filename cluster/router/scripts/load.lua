-- What is pending on workers, and their places in the sorted sets. A call that changes a worker ends with `write_workers`.

-- Microseconds that a worker needs for what is pending and so much more: prompts one after another, answers at its full
-- batch.
local function work_us(w, prefill, gen) return (w.prefill + prefill) * w.per_token + (w.gen + gen) * w.per_step / w.seqs end

local TYPICAL_PROMPT, TYPICAL_ANSWER = 512, 256 -- tokens

-- The place of a worker in its `queue`.
local function score(w) return math.floor(work_us(w, TYPICAL_PROMPT, TYPICAL_ANSWER)) end

-- Moves a worker to its place in the start of its set, after its score has grown. One that falls behind what was read of a
-- longer set stands in the start no more.
local function move(start, w)
  local ids, scores, last = start.ids, start.scores, #start.ids
  local id, now, from, to = w.id, score(w), 1, last
  while from <= last and ids[from] ~= id do from = from + 1 end
  if from > last then return end
  while to > from and (scores[to] > now or (scores[to] == now and ids[to] > id)) do to = to - 1 end
  table.remove(ids, from)
  table.remove(scores, from)
  if to == last and not start.whole then return end
  table.insert(ids, to, id)
  table.insert(scores, to, now)
end

-- Notes a worker's state, to be written. Where a set's start has been read loads only grow.
local function put(w)
  book[w.id], changed[w.id] = w, w
  local start = starts[set_key('queue', w.role, w.profile, w.model)]
  if start then move(start, w) end
end

-- Writes the workers that have changed, and puts them into the sets of their roles; one that is draining stands in none.
local function write_workers()
  if not next(changed) then return end
  local states, queues, rooms = { 'HSET', workers }, {}, {}
  for id, w in pairs(changed) do
    states[#states + 1] = id
    states[#states + 1] = struct.pack(STATE, w.beat, w.per_token, w.per_step, w.seqs, w.capacity, w.prefill, w.decode,
      w.gen, w.n, w.epoch, w.model, w.role, w.home, w.fingerprint, w.profile, w.engine, w.kv)
    if w.role ~= 'draining' then
      local key = set_key('queue', w.role, w.profile, w.model)
      local queue, room = queues[key], rooms[key]
      if not queue then
        queue, room = { 'ZADD', key }, { 'ZADD', set_key('room', w.role, w.profile, w.model) }
        queues[key], rooms[key] = queue, room
      end
      local at = #queue
      queue[at + 1], queue[at + 2] = score(w), id
      room[at + 1], room[at + 2] = w.prefill + w.decode, id
    end
  end
  changed = {}
  redis.call(unpack(states))
  for key, queue in pairs(queues) do
    redis.call(unpack(queue))
    redis.call(unpack(rooms[key]))
  end
end

-- Takes a worker out of the sets of a role. A profile that nobody has any more is forgotten.
local function unplace(id, model, role, profile)
  write_workers()
  starts = {}
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
  book[id], changed[id] = false, nil
  redis.call('ZREM', base .. 'beats', id)
  redis.call('DEL', worker_key(id))
  return redis.call('HDEL', workers, id)
end
