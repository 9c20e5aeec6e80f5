-- Writes leases again that Redis has lost while their requests ran on, if their workers have registered again: as other
-- lives, but at the address of the same process. ARGV: 1 now (ms), 2 lease (ms), then one lease each (JSON): id, epoch,
-- request, p and d (worker id and engine address), prompt (tokens not yet computed), held (prompt tokens), new (of one
-- sample), left (samples that run). Returns how many were written; one that is there, or elsewhere, is left alone.
local now, adopted = tonumber(ARGV[1]), 0
local function life(place)
  local w = worker(place[1])
  return w and w.engine == place[2] and w.epoch or nil
end

for i = 3, #ARGV do
  local l = cjson.decode(ARGV[i])
  local p, d = life(l.p), life(l.d)
  if p and d and not lease(l.id) then
    open_lease({ id = l.id, released = 0, ended = 0, used = 0, fresh = l.prompt, prompt = l.held, new = l.new, n = l.left,
      request = l.request, epoch = l.epoch, p = l.p[1], p_epoch = p, d = l.d[1], d_epoch = d, tenant = '', reply = '' },
      now + tonumber(ARGV[2]))
    charge(l.p[1], p, l.prompt, 0, 0, 0)
    charge(l.d[1], d, 0, l.held + l.left * l.new, l.left * l.new, l.left)
    adopted = adopted + 1
    write_leases()
    write_workers()
  end
end
return adopted
