-- First tokens are out: each prefill worker gets its tokens back before the request ends.
-- ARGV, of each: lease id, lease epoch. Returns for each 1 if this call gave them back, else 0.
local given = {}
for i = 1, #ARGV, 2 do
  local l = lease(ARGV[i])
  local owed = l and l.epoch == ARGV[i + 1] and l.released == 0 and l.fresh > 0
  if owed then
    l.released = 1
    keep_lease(l)
    charge(l.p, l.p_epoch, -l.fresh, 0, 0, 0)
  end
  given[#given + 1] = owed and 1 or 0
end
write_workers()
return given
