-- A lease: `n` samples on one pair of workers, packed in one string. The prompt is charged once, each sample's new tokens
-- by themselves. Numbers: 1 once the prefill worker has its tokens back, samples that have ended, tokens that these
-- generated; uncached prompt, prompt, new of one sample (tokens); samples. `reply`: of `route`, should that be repeated.
local LEASE = '>ddddddd ssssssss'

local function lease_key(id) return base .. 'lease:' .. id end

-- A lease as it was read; nil where there was none.
local function unpacked_lease(id, text)
  if not text then return nil end
  local released, ended, used, fresh, prompt, new, n, request, epoch, p, p_epoch, d, d_epoch, tenant, reply =
    struct.unpack(LEASE, text)
  return { id = id, released = released, ended = ended, used = used, fresh = fresh, prompt = prompt, new = new, n = n,
    request = request, epoch = epoch, p = p, p_epoch = p_epoch, d = d, d_epoch = d_epoch, tenant = tenant, reply = reply }
end

-- A lease, or nil.
local function lease(id) return unpacked_lease(id, redis.call('GET', lease_key(id))) end

local function packed_lease(l)
  return struct.pack(LEASE, l.released, l.ended, l.used, l.fresh, l.prompt, l.new, l.n, l.request, l.epoch, l.p, l.p_epoch,
    l.d, l.d_epoch, l.tenant, l.reply)
end

local function keep_lease(l) redis.call('SET', lease_key(l.id), packed_lease(l)) end

-- New leases, to be written before the workers that they charge (`write_workers`).
local texts, expiries = { 'MSET' }, { 'ZADD', base .. 'leases' }

-- Notes a new lease, which ends by itself at a time (ms).
local function open_lease(l, expires)
  texts[#texts + 1] = lease_key(l.id)
  texts[#texts + 1] = packed_lease(l)
  expiries[#expiries + 1] = expires
  expiries[#expiries + 1] = l.id
end

local function write_leases()
  if #texts == 1 then return end
  redis.call(unpack(texts))
  redis.call(unpack(expiries))
  texts, expiries = { 'MSET' }, { 'ZADD', base .. 'leases' }
end
