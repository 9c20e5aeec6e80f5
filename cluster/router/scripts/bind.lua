-- The draft actor of a pool that an engine shall ask: the one it has, unless that is dead or another has fewer engines.
-- ARGV: 1 pool, 2 the engine's worker id, 3 now (ms), 4 ms of silence after which either is gone. Returns the actor's
-- facts (JSON), or nil.
local drafts, bound, engine = base .. 'drafts:' .. ARGV[1], base .. 'bound:' .. ARGV[1], ARGV[2]
local now, ttl = tonumber(ARGV[3]), tonumber(ARGV[4])

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

local facts, load, mine, best = living(drafts), {}, nil, nil
for other, draft in pairs(living(bound)) do
  if other == engine then
    mine = facts[draft] and draft
  else
    load[draft] = (load[draft] or 0) + 1
  end
end
for draft in pairs(facts) do
  local less = best and (load[draft] or 0) - (load[best] or 0)
  if not best or less < 0 or (less == 0 and draft < best) then best = draft end
end
if not best then
  redis.call('HDEL', bound, engine)
  return nil
end
if not mine or (load[mine] or 0) > (load[best] or 0) then mine = best end
redis.call('HSET', bound, engine, ARGV[3] .. ' ' .. mine)
return facts[mine]
