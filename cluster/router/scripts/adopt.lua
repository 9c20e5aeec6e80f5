-- Writes leases again that Redis has lost while their requests ran on, if their workers have registered again: as other
-- lives, but at the address of the same process. ARGV: 1 now (ms), 2 lease (ms), then one lease each (JSON): id, epoch,
-- request, p and d (worker id and engine address), prompt (tokens not yet computed), held (prompt tokens), new (of one
-- sample), left (samples that run). Returns how many were written; one that is there, or elsewhere, is left alone.
local now, adopted = tonumber(ARGV[1]), 0
local function life(worker)
  local known = redis.call('HMGET', worker_key(worker[1]), 'engine', 'epoch')
  return known[1] == worker[2] and known[2] or nil
end

for i = 3, #ARGV do
  local l = cjson.decode(ARGV[i])
  local key, p, d = base .. 'lease:' .. l.id, life(l.p), life(l.d)
  if p and d and redis.call('EXISTS', key) == 0 then
    redis.call('HSET', key, 'request', l.request, 'epoch', l.epoch, 'reply', '', 'p', l.p[1], 'pe', p, 'pt', l.prompt,
      'd', l.d[1], 'de', d, 'dt', l.held, 'g', l.new, 'n', l.left, 'left', l.left, 'tenant', '', 'used', 0)
    redis.call('ZADD', base .. 'leases', now + tonumber(ARGV[2]), l.id)
    charge(l.p[1], p, l.prompt, 0, 0, 0)
    charge(l.d[1], d, 0, l.held + l.left * l.new, l.left * l.new, l.left)
    adopted = adopted + 1
  end
end
return adopted
