-- The draft actor of a pool that an engine shall ask: the one it has, unless that is dead or another would answer a good
-- deal sooner. An answer takes the round trip that the engine has measured, and the actor's own time for a round as often
-- as it has engines.
-- ARGV: 1 pool, 2 the engine's worker id, 3 now (ms), 4 ms of silence after which either is gone, then in turns an actor's
-- id and the round trip to it (ms). Returns the actor's facts (JSON), or nil.
local drafts, bound, engine = base .. 'drafts:' .. ARGV[1], base .. 'bound:' .. ARGV[1], ARGV[2]
local now, ttl = tonumber(ARGV[3]), tonumber(ARGV[4])
local GAIN = 0.8  -- of the time it has: a new actor must be told all sequences, and compute them
local ROUND_MS = 1  -- of an actor that has drafted nothing yet

-- The live entries of a hash, each '<ms of its last word> <text>'; silent ones are forgotten.
local function living(key)
  local found, entries = {}, redis.call('HGETALL', key)
  for i = 1, #entries, 2 do
    local beat, text = string.match(entries[i + 1], '^(%d+) (.*)$')
    if beat and tonumber(beat) + ttl >= now then
      found[entries[i]] = text
    else
      redis.call('HDEL', key, entries[i])
    end
  end
  return found
end

local facts, load, mine = living(drafts), {}, nil
for other, draft in pairs(living(bound)) do
  if other == engine then
    mine = facts[draft] and draft
  else
    load[draft] = (load[draft] or 0) + 1
  end
end

local trips, costs, best = {}, {}, nil
for i = 5, #ARGV, 2 do trips[ARGV[i]] = tonumber(ARGV[i + 1]) end
for draft, text in pairs(facts) do
  local read, told = pcall(cjson.decode, text)
  local round = read and type(told) == 'table' and tonumber(told.round_ms) or 0
  costs[draft] = (trips[draft] or 0) + (1 + (load[draft] or 0)) * (round > 0 and round or ROUND_MS)
  local less = best and costs[draft] - costs[best]
  if not best or less < 0 or (less == 0 and draft < best) then best = draft end
end
if not best then
  redis.call('HDEL', bound, engine)
  return nil
end
if not mine or costs[best] < GAIN * costs[mine] then mine = best end
redis.call('HSET', bound, engine, ARGV[3] .. ' ' .. mine)
return facts[mine]
