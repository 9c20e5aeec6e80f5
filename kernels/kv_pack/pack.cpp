// KV blocks to the wire layout [kv head][token][part][head_dim] and back, and whole blocks to and from one buffer.
//
// The plain C interface is called by `native_calls.py`, which has checked every index and size. What the numbers of an
// interior mean is told in `interior.py`.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "leaves.h"

namespace joinwise::kv_pack {
namespace {

constexpr Size kScratchTokens = 32;

// Where the elements of one dimension lie, in bytes: runs of `tile` elements `inner` apart, the runs `outer` apart.
struct Axis {
    Size size, tile, outer, inner;

    Axis(Size size_, const Size* numbers, Size element) : size(size_) {
        tile = numbers[0], outer = numbers[1] * element, inner = numbers[2] * element;
        if (tile >= size || outer == tile * inner) tile = size;  // one run
    }
    Size at(Size index) const { return index / tile * outer + index % tile * inner; }
    Size run(Size index, Size end) const { return std::min(end, index - index % tile + tile) - index; }
};

// One part (keys, values or a latent) of one head in one block.
class Part {
   public:
    // numbers: offset, head stride, token (tile, outer stride, inner stride), dim (the same), all in elements.
    Part(Size block_size, Size head_dim, const Size* numbers, Size element_)
        : offset(numbers[0] * element_),
          head_stride(numbers[1] * element_),
          element(element_),
          token(block_size, numbers + 2, element_),
          dim(head_dim, numbers + 5, element_) {
        widen();
        const Size tile = token.tile * dim.tile;
        if (dim.tile == dim.size && dim.inner == element)
            way = Way::kRows;
        else if (element == 2 && token.tile == 2 && token.inner == 2 && dim.inner == 4 && token.outer == 4 * dim.tile)
            way = Way::kPaired;
        else if (token.inner == element && tile >= 16)
            way = Way::kTransposed;
        else
            way = Way::kScattered;
        for (Size i = 0; i < dim.size; ++i) dim_at.push_back(dim.at(i));
    }

    Size offset, head_stride;

    // Tokens [first, first + count) of a head that begins at `inside`, to or from rows of head_dim elements.
    template <bool Pack>
    void move(Byte* inside, Size first, Size count, Byte* rows, Size row_stride, bool stream) const {
        const Size end = first + count;
        if (way == Way::kPaired) return move_paired<Pack>(inside, first, end, rows, row_stride, stream);
        for (Size t = first, run; t < end; t += run, rows += run * row_stride) {
            run = token.run(t, end);
            Byte* at = inside + token.at(t);
            if (way == Way::kRows)
                move_rows<Pack>(at, run, rows, row_stride, stream);
            else if (way == Way::kTransposed)
                move_transposed<Pack>(at, run, rows, row_stride, stream);
            else
                for (Size i = 0; i < run; ++i) scatter<Pack>(at + i * token.inner, rows + i * row_stride);
        }
    }

    // The same with another type on the outside; `scratch` holds kScratchTokens rows of the inside's type.
    template <bool Pack>
    void move_converted(Byte* inside, Size first, Size count, Byte* rows, Size row_stride, ConvertRows convert,
                        Size numbers, Byte* scratch) const {
        const Size end = first + count, row_bytes = dim.size * element;
        for (Size t = first, run; t < end; t += run, rows += run * row_stride) {
            Byte* half_way = scratch;
            Size stride = row_bytes;
            if (way == Way::kRows) {  // rows already: no scratch
                run = token.run(t, end), half_way = inside + token.at(t), stride = token.inner;
            } else {
                run = std::min(end - t, kScratchTokens);
                if (Pack) move<true>(inside, t, run, scratch, row_bytes, false);
            }
            if (Pack)
                convert(half_way, stride, rows, row_stride, run, numbers);
            else
                convert(rows, row_stride, half_way, stride, run, numbers);
            if (!Pack && way != Way::kRows) move<false>(inside, t, run, scratch, row_bytes, false);
        }
    }

   private:
    enum class Way {
        kRows,        // the dims of a token lie together
        kTransposed,  // tokens lie together
        kPaired,      // pairs of tokens, dim by dim, pair after pair: the values of an AMX tile
        kScattered,
    };

    // Neighbouring dims that stay neighbours are moved as one wider element, as the pairs of an AMX tile are.
    void widen() {
        for (Size by : {4, 2}) {
            const Size wide = element * by;
            const bool whole = !(offset % wide || head_stride % wide || token.outer % wide || token.inner % wide ||
                                 dim.outer % wide || dim.size % by);
            if (dim.tile == by && dim.tile < dim.size && dim.inner == element && wide <= 8 && whole) {
                element = wide;
                dim.size /= by, dim.tile = dim.size, dim.inner = dim.outer;
            }
        }
    }

    template <bool Pack>
    void move_rows(Byte* at, Size run, Byte* rows, Size row_stride, bool stream) const {
        const CopyRows copy = leaves().copy_rows;
        if (Pack)
            copy(at, token.inner, rows, row_stride, run, dim.size * element, stream);
        else
            copy(rows, row_stride, at, token.inner, run, dim.size * element, stream);
    }

    template <bool Pack>
    void move_transposed(Byte* at, Size run, Byte* rows, Size row_stride, bool stream) const {
        const Transpose transpose = leaves().transpose(element);
        for (Size d = 0, dims; d < dim.size; d += dims) {
            dims = dim.run(d, dim.size);
            if (Pack)
                transpose(at + dim.at(d), dim.inner, rows + d * element, row_stride, dims, run, stream);
            else
                transpose(rows + d * element, row_stride, at + dim.at(d), dim.inner, run, dims, stream);
        }
    }

    template <bool Pack>
    void move_paired(Byte* inside, Size first, Size end, Byte* rows, Size row_stride, bool stream) const {
        const auto alone = [&](Size t) { scatter<Pack>(inside + token.at(t), rows + (t - first) * row_stride); };
        const Size even = first + first % 2, pairs = (end - even) / 2;
        if (even != first) alone(first);
        if (even < end && (end - even) % 2) alone(end - 1);
        Byte* row = rows + (even - first) * row_stride;
        for (Size d = 0; d < dim.size && pairs > 0; d += dim.tile) {
            Byte* at = inside + token.at(even) + dim.at(d);
            const Size columns = dim.run(d, dim.size);
            if (Pack)
                leaves().split_pairs(at, row + 2 * d, row_stride, pairs, columns, stream);
            else
                leaves().join_pairs(row + 2 * d, at, row_stride, pairs, columns, stream);
        }
    }

    template <bool Pack>
    void scatter(Byte* at, Byte* row) const {
        switch (element) {
            case 1: return scatter<Pack, std::uint8_t>(at, row);
            case 2: return scatter<Pack, std::uint16_t>(at, row);
            case 4: return scatter<Pack, std::uint32_t>(at, row);
            default: return scatter<Pack, std::uint64_t>(at, row);
        }
    }

    template <bool Pack, typename T>
    void scatter(Byte* at, Byte* row) const {
        for (Size i = 0; i < dim.size; ++i) {
            Byte* outside = row + i * sizeof(T);
            std::memcpy(Pack ? outside : at + dim_at[i], Pack ? at + dim_at[i] : outside, sizeof(T));
        }
    }

    Size element;  // bytes
    Axis token, dim;
    Way way;
    std::vector<Size> dim_at;
};

struct Job {
    std::vector<Part> parts;
    Size block_size, block_stride;  // tokens, bytes
    Size inside_row, outside_row;   // bytes of head_dim elements
    Size head_dim;
    Byte* cache;
    Byte* wire;
    const Size* block_ids;
    Size first_token, num_tokens, first_head, num_heads;
    ConvertRows convert;  // null: the same type inside and outside
    bool stream;

    // A unit is what one head has in one block; those of a block follow each other.
    Size first_block() const { return first_token / block_size; }
    Size units() const { return ((first_token + num_tokens - 1) / block_size + 1 - first_block()) * num_heads; }

    template <bool Pack>
    void run(Size first_unit, Size end_unit) const {
        std::vector<Byte> scratch(convert ? kScratchTokens * inside_row : 0);
        for (Size unit = first_unit; unit < end_unit; ++unit) {
            const Size block = first_block() + unit / num_heads, head = unit % num_heads;
            const Size begin = std::max(first_token, block * block_size);
            const Size count = std::min(first_token + num_tokens, (block + 1) * block_size) - begin;
            Byte* inside = cache + block_ids[block] * block_stride;
            Byte* rows = wire + (head * num_tokens + begin - first_token) * outside_row * parts.size();
            for (const Part& part : parts) {
                Byte* at = inside + part.offset + (first_head + head) * part.head_stride;
                const Size stride = outside_row * parts.size();
                if (convert)
                    part.move_converted<Pack>(at, begin % block_size, count, rows, stride, convert, head_dim,
                                              scratch.data());
                else
                    part.move<Pack>(at, begin % block_size, count, rows, stride, stream);
                rows += outside_row;
            }
        }
        if (stream) std::atomic_thread_fence(std::memory_order_seq_cst);  // also orders what went around the caches
    }
};

// Shares the units among threads; this one works too, and does what a thread that cannot be started would have done.
template <bool Pack>
void run(const Job& job, Size threads) {
    const Size units = job.units();
    threads = std::max<Size>(1, std::min(threads, units));
    const auto bound = [&](Size part) { return units * part / threads; };
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    Size started = 1;
    try {
        for (; started < threads; ++started)
            others.emplace_back(&Job::run<Pack>, &job, bound(started), bound(started + 1));
    } catch (const std::exception&) {
    }
    job.run<Pack>(0, bound(1));
    job.run<Pack>(bound(started), units);
    for (std::thread& other : others) other.join();
}

// Neighbouring blocks are copied as one piece.
template <bool Gather>
void copy_blocks(Byte* cache, Size stride, Size block_bytes, const Size* ids, Size count, Byte* flat) {
    for (Size i = 0, run; i < count; i += run) {
        run = 1;
        if (stride == block_bytes)
            while (i + run < count && ids[i + run] == ids[i] + run) ++run;
        Byte* inside = cache + ids[i] * stride;
        Byte* outside = flat + i * block_bytes;
        std::memcpy(Gather ? outside : inside, Gather ? inside : outside, run * block_bytes);
    }
}

}  // namespace
}  // namespace joinwise::kv_pack

using namespace joinwise::kv_pack;

extern "C" {

// interior: block_size, head_dim, block stride, number of parts, then eight numbers for each part (see Part).
// Types are those of `Float`; element is the size of the cache's in bytes. The wire has num_heads x num_tokens rows.
// stream: write around the processor's caches.
void joinwise_kv_move(int pack, const Size* interior, Byte* cache, Size element, int cache_type, int wire_type,
                      Byte* wire, const Size* block_ids, Size first_token, Size num_tokens, Size first_head,
                      Size num_heads, int stream, Size threads) {
    if (num_tokens == 0) return;
    const Size block_size = interior[0], head_dim = interior[1];
    Job job{};
    for (Size part = 0; part < interior[3]; ++part)
        job.parts.emplace_back(block_size, head_dim, interior + 4 + 8 * part, element);
    job.block_size = block_size, job.block_stride = interior[2] * element;
    job.head_dim = head_dim, job.inside_row = head_dim * element, job.outside_row = job.inside_row;
    if (cache_type != wire_type) {
        job.outside_row = head_dim * (wire_type == kFloat32 ? 4 : 2);
        job.convert = pack ? leaves().convert[cache_type][wire_type] : leaves().convert[wire_type][cache_type];
    }
    job.cache = cache, job.wire = wire, job.block_ids = block_ids;
    job.first_token = first_token, job.num_tokens = num_tokens;
    job.first_head = first_head, job.num_heads = num_heads;
    job.stream = stream;
    pack ? run<true>(job, threads) : run<false>(job, threads);
}

void joinwise_gather_blocks(Byte* cache, Size stride, Size block_bytes, const Size* ids, Size count, Byte* flat) {
    copy_blocks<true>(cache, stride, block_bytes, ids, count, flat);
}

void joinwise_scatter_blocks(Byte* cache, Size stride, Size block_bytes, const Size* ids, Size count, Byte* flat) {
    copy_blocks<false>(cache, stride, block_bytes, ids, count, flat);
}
}
