-- Ends a lease and gives back all that it still holds, exactly once however often it is called.
-- ARGV: 1 lease id, 2 lease epoch ('' for a lease whose answer never arrived). Returns 1 if this call ended it.
local held = redis.call('HGET', base .. 'lease:' .. ARGV[1], 'epoch')
if held and ARGV[2] ~= '' and held ~= ARGV[2] then return 0 end
return end_lease(ARGV[1])
