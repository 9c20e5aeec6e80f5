-- The short list: of each role the few with the least work, the one with the fewest tokens where those are full, and
-- whoever holds a part of the prompt or served the session. Its length does not depend on the number of workers.
local to_come = 0 -- decisions that this call makes after the present one

-- The least loaded of a set, at least so many where it has them, as they stand after this call's decisions so far. Each
-- decision still to come pushes at most one of them out, so one reading serves them all.
local function start_of(key, count)
  local start = starts[key]
  if start and (start.whole or #start.ids >= count) then return start.ids end
  write_workers()
  if to_come == 0 then return redis.call('ZRANGE', key, 0, count - 1) end
  local most, ids, scores = count + to_come, {}, {}
  local found = redis.call('ZRANGE', key, 0, most - 1, 'WITHSCORES')
  for i = 1, #found / 2 do ids[i], scores[i] = found[2 * i - 1], tonumber(found[2 * i]) end
  starts[key] = { ids = ids, scores = scores, whole = #ids < most }
  return ids
end

-- Puts workers into the pools that they belong to, with what the request would cost them. `listed`: they were found in a
-- set. Returns whether one was dead: it is met once and forgotten, and registers again if it lives.
local function look_at(ids, listed, demand, fit, pools)
  local dead = false
  read_workers(ids)
  for _, id in ipairs(ids) do
    local w = book[id]
    if not w or w.beat < demand.oldest then
      dead = true
      drop_worker(id)
      if not w then bury(id, demand.model, fit.profiles) end
    else
      if listed then w.listed = to_come end
      if w.seen ~= to_come then
        w.seen = to_come
        if w.model == demand.model and fit.profiles[w.profile] and w.role ~= 'draining' and not demand.excluded[id] then
          cost(w, demand)
          local pool = pools[w.role]
          pool[#pool + 1] = w
        end
      end
    end
  end
  return dead
end

-- Profiles in which no worker listed has room for all of the request; nil when there is none.
local function crowded(found, demand)
  local full = nil
  for _, w in ipairs(found) do
    if w.listed == to_come and not fits_in(w, 'whole', demand) then
      full = full or {}
      full[w.profile] = true
    end
  end
  if full then
    for _, w in ipairs(found) do
      if w.listed == to_come and fits_in(w, 'whole', demand) then full[w.profile] = nil end
    end
  end
  return full
end

-- Candidates by role. A worker of the list has room for all of the request, unless no worker of its set has.
local function short_list(demand, fit)
  local pools, few = { prefill = {}, decode = {}, mixed = {} }, FEW + demand.spared -- as many more as are excluded
  repeat
    local ids = {}
    for _, key in ipairs(fit.queues) do
      local start = start_of(key, few)
      for i = 1, math.min(few, #start) do ids[#ids + 1] = start[i] end
    end
  until not look_at(ids, true, demand, fit, pools)
  if demand.session or next(demand.held) then
    local ids = { demand.session }
    for id in pairs(demand.held) do ids[#ids + 1] = id end
    look_at(ids, false, demand, fit, pools)
  end
  repeat
    local ids = {}
    for role, found in pairs(pools) do
      for profile in pairs(crowded(found, demand) or {}) do
        write_workers()
        local key = set_key('room', role, profile, demand.model)
        for _, id in ipairs(redis.call('ZRANGE', key, 0, demand.spared)) do ids[#ids + 1] = id end
      end
    end
  until #ids == 0 or not look_at(ids, true, demand, fit, pools)
  return pools
end
