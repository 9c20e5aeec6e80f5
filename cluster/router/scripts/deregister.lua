-- Forgets a worker that leaves. ARGV: 1 worker id, 2 epoch. Returns 0 if another life of it is registered, or none.
local w = worker(ARGV[1])
if not w or w.epoch ~= ARGV[2] then return 0 end
return drop_worker(ARGV[1])
