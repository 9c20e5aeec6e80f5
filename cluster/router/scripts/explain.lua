-- Why: every decision is kept for a while, so that it can be explained.

-- One line a candidate: id, role, wait, pre, harm, queue, stall, move (us), uncached prompt tokens, pending tokens.
local function candidates(pools)
  local lines = {}
  for _, role in ipairs({ 'prefill', 'decode', 'mixed' }) do
    for _, w in ipairs(pools[role]) do
      lines[#lines + 1] = string.format('%s %s %d %d %d %d %d %d %d %d', w.id, role, w.wait * 1000, w.pre * 1000,
        w.harm * 1000, w.queue * 1000, w.stall * 1000, w.move * 1000, w.fresh, pending_on(w))
    end
  end
  return table.concat(lines, '\n')
end

-- `kept`: decisions that are kept, about; 0 keeps none. `pools`: nil when no worker was looked at.
local function explain(kept, request, now, verdict, chosen, ms, pools)
  if kept == 0 then return end
  redis.call('XADD', base .. 'decisions', 'MAXLEN', '~', kept, '*', 'request', request, 'at', now, 'verdict', verdict,
    'chosen', chosen, 'ms', string.format('%.1f', ms), 'candidates', pools and candidates(pools) or '')
end
