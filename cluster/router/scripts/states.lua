-- Workers as they stand. ARGV: their ids. Returns for each that is registered: registration and load (JSON), epoch, role,
-- and last heartbeat (ms), pending prompt tokens, KV tokens, tokens to generate, sequences, capacity in KV tokens.
local answer = {}
for i, state in ipairs(redis.call('HMGET', workers, unpack(ARGV))) do
  local w = state and unpacked(ARGV[i], state)
  local said = w and redis.call('HMGET', worker_key(w.id), 'info', 'load')
  if said and said[1] then
    answer[#answer + 1] = { said[1], said[2], w.epoch, w.role, string.format('%.0f %.0f %.0f %.0f %.0f %.0f', w.beat, w.prefill,
      w.decode, w.gen, w.n, w.capacity) }
  end
end
return answer
