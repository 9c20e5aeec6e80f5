-- How many wait in each class. ARGV: 1 now (ms), then the classes. Returns their counts.
local now, counts = tonumber(ARGV[1]), {}
for i = 2, #ARGV do counts[i - 1] = head(ARGV[i], now) and waiting(ARGV[i]) or 0 end
return counts
