-- A lease: `n` samples on one pair of workers, packed in one string. The prompt is charged once, each sample's new tokens
-- by themselves. Numbers: 1 once the prefill worker has its tokens back, samples that have ended, tokens that these
-- generated; uncached prompt, prompt, new of one sample (tokens); samples. `reply`: of `route`, should that be repeated.
local LEASE = '>ddddddd ssssssss'

local function lease_key(id) return base .. 'lease:' .. id end

-- A lease, or nil.
local function lease(id)
  local text = redis.call('GET', lease_key(id))
  if not text then return nil end
  local released, ended, used, fresh, prompt, new, n, request, epoch, p, p_epoch, d, d_epoch, tenant, reply =
    struct.unpack(LEASE, text)
  return { id = id, released = released, ended = ended, used = used, fresh = fresh, prompt = prompt, new = new, n = n,
    request = request, epoch = epoch, p = p, p_epoch = p_epoch, d = d, d_epoch = d_epoch, tenant = tenant, reply = reply }
end

local function keep_lease(l)
  redis.call('SET', lease_key(l.id), struct.pack(LEASE, l.released, l.ended, l.used, l.fresh, l.prompt, l.new, l.n,
    l.request, l.epoch, l.p, l.p_epoch, l.d, l.d_epoch, l.tenant, l.reply))
end

-- Writes a new lease, which ends by itself at a time (ms).
local function open_lease(l, expires)
  keep_lease(l)
  redis.call('ZADD', base .. 'leases', expires, l.id)
end
