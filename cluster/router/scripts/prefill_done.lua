-- The first token is out: the prefill worker gets its tokens back before the request ends.
-- ARGV: 1 lease id, 2 lease epoch. Returns 1 if this call gave them back.
local l = lease(ARGV[1])
if not l or l.epoch ~= ARGV[2] or l.released == 1 or l.fresh == 0 then return 0 end
l.released = 1
keep_lease(l)
charge(l.p, l.p_epoch, -l.fresh, 0, 0, 0)
write_workers()
return 1
