-- The first token is out: the prefill worker gets its tokens back before the request ends.
-- ARGV: 1 lease id, 2 lease epoch. Returns 1 if this call gave them back.
local key = base .. 'lease:' .. ARGV[1]
local lease = redis.call('HMGET', key, 'epoch', 'p', 'pe', 'pt')
if lease[1] ~= ARGV[2] or lease[4] == '0' then return 0 end
redis.call('HSET', key, 'pt', '0')
charge(lease[2], lease[3], -tonumber(lease[4]), 0, 0, 0)
return 1
