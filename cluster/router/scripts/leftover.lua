-- What a lease is for. ARGV: 1 lease id. Returns its request's id, or nil.
local l = lease(ARGV[1])
return l and l.request
