-- Choosing among workers. `demand`: model, needs and excluded (lists), oldest (ms of the last acceptable heartbeat).

-- The worker if it is alive and has everything that is needed, else nil.
local function eligible(id, role, demand)
  local fields = redis.call('HMGET', worker_key(id), 'beat', 'caps', 'epoch', 'engine', 'kv', 'load')
  if not fields[1] or tonumber(fields[1]) < demand.oldest then return nil end
  for _, need in ipairs(demand.needs) do
    if not string.find(fields[2], '\n' .. need .. '\n', 1, true) then return nil end
  end
  for _, other in ipairs(demand.excluded) do
    if other == id then return nil end
  end
  return { id = id, role = role, epoch = fields[3], engine = fields[4], kv = fields[5], load = fields[6] }
end

-- Join-the-shortest-queue: the eligible worker of a role with the fewest pending tokens, or nil.
local function shortest(role, demand)
  local from, page = 0, nil
  repeat
    page = redis.call('ZRANGE', queue_key(role, demand.model), from, from + 15, 'WITHSCORES')
    for i = 1, #page, 2 do
      local worker = eligible(page[i], role, demand)
      if worker then
        worker.pending = tonumber(page[i + 1])
        return worker
      end
    end
    from = from + 16
  until #page == 0
  return nil
end

-- The one with fewer pending tokens; on a tie the first, which is the specialist.
local function lesser(a, b)
  if a and b then return b.pending < a.pending and b or a end
  return a or b
end

local function reserve(worker, model, phase, tokens)
  redis.call('HINCRBY', worker_key(worker.id), phase, tokens)
  redis.call('ZINCRBY', queue_key(worker.role, model), tokens, worker.id)
end
