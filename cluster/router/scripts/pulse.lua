-- What was decided lately. ARGV: 1 the oldest that counts (ms), 2 entries to look at, at most.
-- Returns the time of the oldest entry looked at (ms; '' for none), then how often each verdict came, and how often each pair
-- of workers (prefill and decode) was taken: both as flat lists of text and count.
local verdicts, pairs_taken, oldest = {}, {}, ''
for _, entry in ipairs(redis.call('XREVRANGE', base .. 'decisions', '+', ARGV[1], 'COUNT', ARGV[2])) do
  local _, _, _, verdict, chosen = struct.unpack(DECISION, entry[2][2])
  oldest = string.match(entry[1], '^%d+')
  verdicts[verdict] = (verdicts[verdict] or 0) + 1
  if string.sub(verdict, 1, 5) == 'split' then pairs_taken[chosen] = (pairs_taken[chosen] or 0) + 1 end
end
local function flat(counts)
  local list = {}
  for text, count in pairs(counts) do
    list[#list + 1] = text
    list[#list + 1] = count
  end
  return list
end
return { oldest, flat(verdicts), flat(pairs_taken) }
