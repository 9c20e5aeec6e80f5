-- Appends a worker's KV event to the stream that all gateways read, unless this life of it is over.
-- ARGV: 1 worker id, 2 epoch, 3 sequence number, 4 '1' for a snapshot, 5 blocks stored, 6 blocks removed (base64 of 8 bytes
--   each), 7 events to keep, about. Without blocks and snapshot nothing is appended.
-- Returns -1 for another life, 1 if a gateway asks for a snapshot, else 0.
local w = worker(ARGV[1])
if not w or w.epoch ~= ARGV[2] then return -1 end
if ARGV[4] == '1' or ARGV[5] ~= '' or ARGV[6] ~= '' then
  redis.call('XADD', base .. 'blocks', 'MAXLEN', '~', ARGV[7], '*', 'w', ARGV[1], 'e', ARGV[2], 's', ARGV[3],
    'all', ARGV[4], 'in', ARGV[5], 'out', ARGV[6])
end
return redis.call('SREM', base .. 'snapshots', ARGV[1])
