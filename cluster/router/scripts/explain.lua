-- Why: every decision is kept for a while, so that it can be explained.

-- A decision, packed: when (ms), cost (ms); request, verdict, chosen; then its candidates, as below.
local DECISION = '>dd sss'
-- A candidate: wait, pre, harm, queue, stall, move (ms), uncached prompt tokens, pending tokens; worker id, role.
local CANDIDATE = '>ffffffdd ss'

-- `kept`: decisions that are kept, about; 0 keeps none. `pools`: nil when no worker was looked at.
local function explain(kept, request, now, verdict, chosen, ms, pools)
  if kept == 0 then return end
  local count, at, values = 0, 5, { now, ms, request, verdict, chosen }
  for _, role in ipairs(ROLES) do
    for _, w in ipairs(pools and pools[role] or {}) do
      values[at + 1], values[at + 2], values[at + 3], values[at + 4], values[at + 5] = w.wait, w.pre, w.harm, w.queue, w.stall
      values[at + 6], values[at + 7], values[at + 8] = w.move, w.fresh, w.prefill + w.decode
      values[at + 9], values[at + 10] = w.id, w.role
      count, at = count + 1, at + 10
    end
  end
  local packed = struct.pack(DECISION .. string.rep(CANDIDATE, count), unpack(values, 1, at))
  redis.call('XADD', base .. 'decisions', 'MAXLEN', '~', kept, '*', 'd', packed)
end
