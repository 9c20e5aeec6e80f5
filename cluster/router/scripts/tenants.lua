-- Limits of one caller: token buckets for requests and tokens a minute, and a bound on what runs at once. They refill
-- with the time given as an argument; a clock that steps back refills nothing. A request larger than its bucket passes
-- when the bucket is full, and leaves a debt.
local ANYONE = { name = '*', rpm = 0, tpm = 0, concurrent = 0, weight = 1 } -- without limits
local function tenant_key(name) return base .. 'tenant:' .. name end

-- A bucket's level now: as left behind, or full, plus what has come in since. `limit` a minute.
local function level_of(level, limit, elapsed_ms)
  local most = math.max(1, limit)
  return math.min(most, tonumber(level or most) + limit * elapsed_ms / 60000)
end

local function limited(t) return t.rpm > 0 or t.tpm > 0 or t.concurrent > 0 end

-- Takes one request of `tokens` out of a tenant's buckets, or returns what is short and the milliseconds to wait.
-- `t`: name, rpm, tpm, concurrent (0 is no limit); `dry`: only say whether it could.
local function enter_tenant(t, now, tokens, dry)
  if not limited(t) then return nil end
  local key = tenant_key(t.name)
  local held = redis.call('HMGET', key, 'requests', 'tokens', 'at', 'running')
  if t.concurrent > 0 and tonumber(held[4] or 0) >= t.concurrent then return 'concurrent', 1000 end
  local elapsed = math.max(0, now - (held[3] or now))
  if t.rpm > 0 then
    local level = level_of(held[1], t.rpm, elapsed)
    if level < 1 then return 'requests', (1 - level) * 60000 / t.rpm end
    held[1] = level - 1
  end
  if t.tpm > 0 then
    local level, asked = level_of(held[2], t.tpm, elapsed), math.min(tokens, t.tpm)
    if level < asked then return 'tokens', (asked - level) * 60000 / t.tpm end
    held[2] = level - tokens
  end
  if dry then return nil end
  local at = math.max(now, tonumber(held[3] or now))
  redis.call('HSET', key, 'requests', held[1] or t.rpm, 'tokens', held[2] or t.tpm, 'at', at)
  redis.call('HINCRBY', key, 'running', 1)
end

-- A tenant's request is over; tokens that were reserved and not generated go back into the bucket.
local function leave_tenant(name, unused)
  local key = tenant_key(name)
  if redis.call('HINCRBY', key, 'running', -1) < 0 then redis.call('HSET', key, 'running', 0) end -- limits are new
  if unused > 0 then redis.call('HINCRBYFLOAT', key, 'tokens', unused) end
end
