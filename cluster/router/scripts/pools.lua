-- The short list: of each role the few with the least work, the one with the fewest tokens where those are full, and
-- whoever holds a part of the prompt or served the session. Its length does not depend on the number of workers.

-- Up to `few` live workers (and as many more as are excluded) from the start of a sorted set.
local function least(key, few, demand, fit, seen, into)
  local dropped
  repeat
    dropped = false
    for _, id in ipairs(redis.call('ZRANGE', key, 0, few + (demand.spared or 0) - 1)) do
      if seen[id] == nil then
        local w, dead = look(id, demand, fit)
        seen[id], dropped = w or false, dropped or dead
        if w then into[#into + 1] = w end
        if dead then redis.call('ZREM', key, id) end
      end
    end
  until not dropped
end

-- Candidates by role. A worker of the list has room for all of the request, unless no worker of its set has.
local function short_list(demand, fit)
  local pools, seen = { prefill = {}, decode = {}, mixed = {} }, {}
  for role, list in pairs(pools) do
    for profile in pairs(fit) do
      least(set_key('queue', role, profile, demand.model), FEW, demand, fit, seen, list)
      local roomy = false
      for _, w in ipairs(list) do roomy = roomy or has_room(w, w.fresh + demand.prompt + demand.new, demand) end
      if not roomy then least(set_key('room', role, profile, demand.model), 1, demand, fit, seen, list) end
    end
  end
  local function add(id)
    if seen[id] ~= nil then return end
    local w = look(id, demand, fit)
    if w then table.insert(pools[w.role], w) end
    seen[id] = w or false
  end
  for id in pairs(demand.held) do add(id) end
  if demand.session then add(demand.session) end
  return pools
end
