-- Ends a whole lease whose answer may have been lost, and the request's place in the queue.
-- ARGV: 1 lease id, 2 class, 3 tenant, 4 queue entry. Returns 1 if there was a lease.
dequeue(ARGV[2], ARGV[3], ARGV[4], 0, 1)
local ended = end_lease(ARGV[1])
write_workers()
return ended
