// Whole KV blocks to and from one contiguous buffer. Plain C interface; see `native_calls.py` for the callers.
#include <cstdint>
#include <cstring>

namespace {

// Neighbouring blocks are copied as one piece.
template <bool Gather>
void copy_blocks(std::uint8_t* cache, std::int64_t stride, std::int64_t block_bytes, const std::int64_t* ids,
                 std::int64_t count, std::uint8_t* flat) {
    for (std::int64_t i = 0; i < count;) {
        std::int64_t run = 1;
        if (stride == block_bytes)
            while (i + run < count && ids[i + run] == ids[i] + run) ++run;
        std::uint8_t* inside = cache + ids[i] * stride;
        std::uint8_t* outside = flat + i * block_bytes;
        std::memcpy(Gather ? outside : inside, Gather ? inside : outside, run * block_bytes);
        i += run;
    }
}

}  // namespace

extern "C" {

void joinwise_gather_blocks(std::uint8_t* cache, std::int64_t stride, std::int64_t block_bytes, const std::int64_t* ids,
                            std::int64_t count, std::uint8_t* flat) {
    copy_blocks<true>(cache, stride, block_bytes, ids, count, flat);
}

void joinwise_scatter_blocks(std::uint8_t* cache, std::int64_t stride, std::int64_t block_bytes,
                             const std::int64_t* ids, std::int64_t count, std::uint8_t* flat) {
    copy_blocks<false>(cache, stride, block_bytes, ids, count, flat);
}

}
