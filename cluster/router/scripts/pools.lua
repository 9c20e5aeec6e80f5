-- The short list: of each role the few with the least work, the one with the fewest tokens where those are full, and
-- whoever holds a part of the prompt or served the session. Its length does not depend on the number of workers.

-- Candidates by role. A worker of the list has room for all of the request, unless no worker of its set has.
local function short_list(demand, fit)
  local pools = { prefill = {}, decode = {}, mixed = {} }
  local seen, listed, asked = {}, {}, {} -- ids that have been asked for, that stand in a set, and that are to be read

  local function ask(id)
    if not seen[id] then
      seen[id], asked[#asked + 1] = true, id
    end
  end

  -- Asks for the start of a sorted set: `few` workers, and as many more as are excluded.
  local function list(kind, role, profile, few)
    for _, id in ipairs(redis.call('ZRANGE', set_key(kind, role, profile, demand.model), 0, few + demand.spared - 1)) do
      listed[id] = true
      ask(id)
    end
  end

  -- Reads who was asked for, all in one call. Returns whether one was dead: it is met once and forgotten, and registers
  -- again if it lives.
  local function read()
    if #asked == 0 then return false end
    local ids, dead = asked, false
    local states = redis.call('HMGET', workers, unpack(ids))
    asked = {}
    for i, id in ipairs(ids) do
      local w = states[i] and unpacked(id, states[i])
      if not w or w.beat < demand.oldest then
        dead = true
        drop_worker(id)
        if not w then bury(id, demand.model, fit) end
      elseif w.model == demand.model and fit[w.profile] and w.role ~= 'draining' and not demand.excluded[id] then
        cost(w, demand)
        local pool = pools[w.role]
        pool[#pool + 1] = w
      end
    end
    return dead
  end

  repeat
    for role in pairs(pools) do
      for profile in pairs(fit) do list('queue', role, profile, FEW) end
    end
    for id in pairs(demand.held) do ask(id) end
    if demand.session then ask(demand.session) end
  until not read()
  repeat
    for role, found in pairs(pools) do
      local crowded = {} -- profiles of which no listed worker has room
      for _, w in ipairs(found) do
        if listed[w.id] then crowded[w.profile] = crowded[w.profile] ~= false and not w.whole_fits end
      end
      for profile, full in pairs(crowded) do
        if full then list('room', role, profile, 1) end
      end
    end
  until not read()
  return pools
end
