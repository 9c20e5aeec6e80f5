-- Why: every decision is kept for a while, so that it can be explained.


-- A decision, packed: when (ms), cost (ms); request, verdict, chosen; then its candidates, as below.
local DECISION = '>dd sss'
-- A candidate: wait, pre, harm, queue, stall, move (ms), uncached prompt tokens, pending tokens; worker id, role.
local CANDIDATE = '>ffffffdd ss'

-- `kept`: decisions that are kept, about; 0 keeps none. `pools`: nil when no worker was looked at.
local function explain(kept, request, now, verdict, chosen, ms, pools)
  if kept == 0 then return end
  local packed = { struct.pack(DECISION, now, ms, request, verdict, chosen) }
  for _, list in ipairs(pools and { pools.prefill, pools.decode, pools.mixed } or {}) do
    for _, w in ipairs(list) do
      packed[#packed + 1] = struct.pack(CANDIDATE, w.wait, w.pre, w.harm, w.queue, w.stall, w.move, w.fresh,
        w.prefill + w.decode, w.id, w.role)
    end
  end
  redis.call('XADD', base .. 'decisions', 'MAXLEN', '~', kept, '*', 'd', table.concat(packed))
end
