-- Ending leases.

-- Ends a lease that was just read, and gives back what it still holds: of its last samples too, where they have not ended.
-- `running`: samples whose tokens are still charged.
local function close_lease(l, running)
  redis.call('ZREM', base .. 'leases', l.id)
  redis.call('DEL', lease_key(l.id))
  if l.n > 1 then redis.call('DEL', base .. 'ended:' .. l.id) end
  local fresh = l.released == 1 and 0 or l.fresh
  if fresh > 0 and l.p ~= l.d then
    charge(l.p, l.p_epoch, -fresh, 0, 0, 0)
    fresh = 0
  end
  charge(l.d, l.d_epoch, -fresh, -(l.prompt + running * l.new), -running * l.new, -running)
  if l.tenant ~= '' then leave_tenant(l.tenant, l.ended * l.new - l.used) end
end

-- Ends a lease; 0 if there is none.
local function end_lease(id)
  local l = lease(id)
  if l then
    close_lease(l, l.n - l.ended)
    return 1
  end
  redis.call('ZREM', base .. 'leases', id)
  return 0
end
