-- Who belongs to a model.

-- The profile of a set of capabilities, recorded for its model. There are few of them: workers of a pool are alike.
local function profile_of(model, capabilities)
  local profile = string.sub(redis.sha1hex(capabilities), 1, 12)
  redis.call('HSET', profiles_key(model), profile, capabilities)
  return profile
end

-- A live worker of the model besides `id`, or nil. The dead that are met are forgotten: should one come back, it must
-- register and be compared.
local function live_peer(id, model, oldest)
  for _, profile in ipairs(redis.call('HKEYS', profiles_key(model))) do
    for _, role in ipairs({ 'prefill', 'decode', 'mixed' }) do
      local key, from, peers = set_key('room', role, profile, model), 0, nil
      repeat
        peers = redis.call('ZRANGE', key, from, from + 1)
        for _, peer in ipairs(peers) do
          local w = worker(peer)
          if peer == id then
            from = from + 1
          elseif w and w.beat >= oldest then
            return peer
          else
            drop_worker(peer)
            redis.call('ZREM', key, peer) -- also where its state was lost
          end
        end
      until #peers == 0
    end
  end
end
