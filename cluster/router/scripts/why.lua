-- Looks through kept decisions, newest first, for those on a request. vLLM puts a prefix before a client's id: an id's
-- end is enough. ARGV: 1 request id ('' for any), 2 where in the stream to begin ('+', or '(' and an entry's id), 3 entries
-- to look at.
-- Returns the last entry looked at ('' when none is left), then for each found: request, at, verdict, chosen, ms, and its
-- candidates, a line each: id, role, wait, pre, harm, queue, stall, move (ms), uncached prompt tokens, pending tokens.
local function lines(packed, at)
  local found = {}
  while at <= #packed do
    local f = { struct.unpack(CANDIDATE, packed, at) }
    found[#found + 1] = string.format('%s %s %.3f %.3f %.3f %.3f %.3f %.3f %.0f %.0f', f[9], f[10], f[1], f[2], f[3], f[4],
      f[5], f[6], f[7], f[8])
    at = f[11]
  end
  return table.concat(found, '\n')
end

local entries, ending = redis.call('XREVRANGE', base .. 'decisions', ARGV[2], '-', 'COUNT', ARGV[3]), '-' .. ARGV[1]
local answer = { #entries == tonumber(ARGV[3]) and entries[#entries][1] or '' }
for _, entry in ipairs(entries) do
  local packed = entry[2][2]
  local at, ms, request, verdict, chosen, rest = struct.unpack(DECISION, packed)
  if ARGV[1] == '' or request == ARGV[1] or string.sub(request, -#ending) == ending then
    answer[#answer + 1] = { request, string.format('%.0f', at), verdict, chosen, string.format('%.3f', ms), lines(packed, rest) }
  end
end
return answer
