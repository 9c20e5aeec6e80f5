// Linear layers in AMX-BF16: a tile of weights, 16 channels of 32 elements of k, is loaded from the rows that they lie in and
// multiplied by 16 rows of x, which are put into the order of the instruction once a call. int8 weights become bfloat16 on the
// way, exactly, 64 elements of k at a time.
//
// A sum belongs to one (m, n) and takes in k tile by tile, in order. The instruction takes denormal numbers for zeros, in what
// it multiplies and in its sums.
//
// Others use the tiles of a thread too (oneDNN keeps a configuration loaded, and remembers that it has): each thread's
// configuration is put back when it is done.
#include "linear.h"

#if !defined(__x86_64__) || !defined(__linux__) || defined(JOINWISE_PLAIN) || !defined(__GNUC__) || \
    (!defined(__clang__) && __GNUC__ < 12)

bool joinwise::verify_gemm::amx_runs() { return false; }
bool joinwise::verify_gemm::amx_linear(const Call&) { return false; }

#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own headers, of values that are wholly overwritten
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512fp16")))
#define INLINE __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512fp16"), always_inline)) inline

namespace joinwise::verify_gemm {
namespace {

constexpr Size kTile = 16;               // channels in a tile of weights, pairs of k and rows in one of x
constexpr Size kPanel = 2 * kTile;       // channels at once
constexpr Size kBlock = 2 * kTile;       // rows at once
constexpr Size kStep = 32;               // elements of k in a tile
constexpr Size kTileBytes = 1024;        // of bfloat16
constexpr Size kWide = 2 * kTileBytes;   // bytes of a panel's two tiles
constexpr Size kMade = 4, kAhead = 2;    // panels' steps of int8 weights that are kept widened, of them not yet multiplied
constexpr Size kNear = 128;              // bytes from int8 weights to those that the L1 cache should fetch
constexpr Size kArranged = 3 << 19;      // bytes of x that are arranged at once: the L2 cache holds them beside a panel

// Tiles: sums of rows 0-15 and 16-31 with either half of a panel, both halves, both blocks of rows.
enum Register : int { kSums = 0, kWeights = 4, kRows = 6 };

// The compiler knows nothing of tiles: what they read is in memory before, what they write after.
template <int T>
INLINE void load(const void* at, Size apart) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(apart), "i"(T) : "memory");
}
template <int T>
INLINE void store(void* at, Size apart) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(apart), "i"(T) : "memory");
}
template <int T>
INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int Sums, int Weights, int Rows>
INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Weights), "i"(Rows));
}

// How many rows, and bytes in each, a thread's tiles have.
struct alignas(64) Shapes {
    Byte palette = 0, start = 0, none[14] = {};
    std::uint16_t bytes[16] = {};
    Byte rows[16] = {};

    void set(int tile, Size tile_rows, Size row_bytes) {
        palette = 1;
        rows[tile] = static_cast<Byte>(tile_rows);
        bytes[tile] = static_cast<std::uint16_t>(row_bytes);
    }
    void keep() { __asm__ volatile("sttilecfg %0" : "=m"(*this)); }
    void use() const {
        if (palette)
            __asm__ volatile("ldtilecfg %0" : : "m"(*this));
        else
            __asm__ volatile("tilerelease" : : : "memory");
    }
};

// Shapes for `channels` of a panel, and tiles of x with room for `columns` rows.
Shapes shapes(Size channels, Size columns) {
    Shapes made;
    for (int half = 0; half < 2; ++half) {
        const Size here = std::clamp<Size>(channels - half * kTile, 1, kTile);
        made.set(kSums + half, here, 4 * columns);
        made.set(kSums + 2 + half, here, 4 * columns);
        made.set(kWeights + half, here, 64);
        made.set(kRows + half, kTile, 4 * columns);
    }
    return made;
}

struct Job {
    const Call* call;
    const Byte* x;     // arranged: tiles of `columns` rows, all of k before the next rows
    Size row, rows;    // of x that are arranged
    Size columns;      // rows that a tile of x has room for
    Size tiles;        // that k takes
    Byte* wide;        // for each thread, room for a panel of int8 weights in bfloat16; null for few rows
};

// The weights of a panel: those of whole steps where they lie, the rest of k behind zeros in room of its own.
struct Panel {
    Size channel, channels, apart, steps;
    const Byte* weights;
    const Byte* soon;  // the weights that are wanted next
    Byte* rest;  // 32 rows of 64 bytes; null if there is no rest
};

// 64 int8 weights of each channel of a panel into tiles of bfloat16, two for either half of it: the first takes every other
// run of 8 weights, and all are 256 times as large (`finish` mends that). A multiple of 256 in float16 has its exponent's
// highest bit set or is zero; shift the rest of the exponent and the fraction to where bfloat16 has them, and it is done.
INLINE void widen(const Panel& panel, Size step, Byte* to) {
    const bool whole = step < panel.steps;
    if (!whole && !(panel.rest && step == panel.steps)) return;
    const Byte* from = whole ? panel.weights + 64 * step : panel.rest;
    const Size apart = whole ? panel.apart : 64;
    const Byte* soon = panel.soon + 64 * step * kPanel;
    const __m512i low = _mm512_set1_epi16(0x07ff), high = _mm512_set1_epi16(static_cast<short>(0xc000));
    for (Size row = 0; row < panel.channels; ++row, from += apart, to += 64, soon += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(soon), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(from + kNear), _MM_HINT_T0);
        const __m512i codes = _mm512_loadu_si512(from), zero = _mm512_setzero_si512();
        const __m512i bytes[2] = {_mm512_unpacklo_epi8(zero, codes), _mm512_unpackhi_epi8(zero, codes)};
        for (int tile = 0; tile < 2; ++tile) {
            const __m512i half = _mm512_castph_si512(_mm512_cvtepi16_ph(bytes[tile]));
            const __m512i lower = _mm512_and_si512(_mm512_srli_epi16(half, 3), low);
            const __m512i made = _mm512_ternarylogic_epi32(half, lower, high, 0xec);  // half & high | lower
            _mm512_store_si512(to + kWide * tile, made);
        }
    }
}

// Some of a panel's weights in bfloat16: where the tiles of its halves lie, and how to go on.
struct Source {
    const Byte* at;
    Size apart, next;  // bytes from a row to the next, and from a tile to that of the next elements of k
};

// Sums of R times 16 rows of x and C halves of a panel take in `tiles` tiles of k.
template <int R, int C>
INLINE void take_in(const Source& from, Size tiles, const Byte* x, Size x_apart, Size block) {
    const Byte* weights = from.at;
    for (Size tile = 0; tile < tiles; ++tile, weights += from.next, x += kTile * x_apart) {
        load<kRows>(x, x_apart);
        if constexpr (R == 2) load<kRows + 1>(x + block, x_apart);
        load<kWeights>(weights, from.apart);
        multiply<kSums, kWeights, kRows>();
        if constexpr (R == 2) multiply<kSums + 2, kWeights, kRows + 1>();
        if constexpr (C == 2) {
            load<kWeights + 1>(weights + kTile * from.apart, from.apart);
            multiply<kSums + 1, kWeights + 1, kRows>();
            if constexpr (R == 2) multiply<kSums + 3, kWeights + 1, kRows + 1>();
        }
    }
}

// Sums of up to 16 rows and 16 channels, where they are `stride` float32 apart by channel, as results.
AVX512 void finish(const Call& call, const float* sums, Size stride, Size row, Size rows, Size channel, Size channels) {
    const auto here = static_cast<__mmask16>((1u << channels) - 1);
    const __m512i lanes = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(static_cast<int>(stride)));
    __m512 scale = _mm512_set1_ps(1.0f), bias = _mm512_setzero_ps();
    if (call.scale) scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, call.scale + channel), _mm512_set1_ps(1.0f / 256));
    if (call.bias) {
        const __m256i narrow = _mm256_maskz_loadu_epi16(here, call.bias + 2 * channel);
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
    }
    Byte* y = call.y + 2 * (row * call.channels + channel);
    for (Size m = 0; m < rows; ++m, y += 2 * call.channels) {
        __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), here, lanes, sums + m, 4);
        if (call.scale) value = _mm512_mul_ps(value, scale);
        if (call.bias) value = _mm512_add_ps(value, bias);
        const __m256bh narrow = _mm512_cvtneps_pbh(value);
        __m256i bits;
        std::memcpy(&bits, &narrow, sizeof bits);
        _mm256_mask_storeu_epi16(y, here, bits);
    }
}

// A block of up to 32 rows with a panel.
template <Number kNumbers, int R, int C>
AVX512 void block(const Job& job, const Panel& panel, const Byte* wide, Size first) {
    alignas(64) Byte made[kMade][2 * kWide];
    alignas(64) float sums[2 * R][kTile * kTile];
    const Size x_apart = 4 * job.columns, x_tile = kTile * x_apart, block = job.tiles * x_tile;
    const Byte* x = job.x + first / kTile * block;
    zero<kSums>();
    if constexpr (C == 2) zero<kSums + 1>();
    if constexpr (R == 2) zero<kSums + 2>();
    if constexpr (R * C == 4) zero<kSums + 3>();
    if constexpr (kNumbers == kBfloat16) {
        take_in<R, C>({panel.weights, panel.apart, 64}, panel.steps, x, x_apart, block);
        if (panel.rest) take_in<R, C>({panel.rest, 64, 64}, 1, x + panel.steps * x_tile, x_apart, block);
    } else if (wide) {
        take_in<R, C>({wide, 64, kWide}, job.tiles, x, x_apart, block);
    } else {
        for (Size step = 0; step < kAhead; ++step) widen(panel, step, made[step % kMade]);
        for (Size step = 0; step < job.tiles / 2; ++step, x += 2 * x_tile) {
            widen(panel, step + kAhead, made[(step + kAhead) % kMade]);  // while those of this step are multiplied
            take_in<R, C>({made[step % kMade], 64, kWide}, 2, x, x_apart, block);
        }
    }
    store<kSums>(sums[0], x_apart);
    if constexpr (C == 2) store<kSums + 1>(sums[1], x_apart);
    if constexpr (R == 2) store<kSums + 2>(sums[2], x_apart);
    if constexpr (R * C == 4) store<kSums + 3>(sums[3], x_apart);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            finish(*job.call, sums[2 * r + c], job.columns, job.row + first + r * kTile,
                   std::min(kTile, job.rows - first - r * kTile), panel.channel + c * kTile,
                   std::min(kTile, panel.channels - c * kTile));
}

template <Number kNumbers>
AVX512 void panel(const Job& job, Size channel, Size channels, Size next, Byte* wide) {
    const Call& call = *job.call;
    constexpr Size width = width_of(kNumbers);
    alignas(64) Byte rest[kPanel][64] = {};
    Panel made{channel, channels, call.k * width, call.k * width / 64, call.weights + channel * call.k * width, call.weights + next * call.k * width, nullptr};
    if (const Size over = call.k * width % 64) {
        for (Size row = 0; row < channels; ++row)
            std::memcpy(rest[row], made.weights + row * made.apart + 64 * made.steps, static_cast<std::size_t>(over));
        made.rest = rest[0];
    }
    if (kNumbers == kInt8 && wide)
        for (Size step = 0; step < job.tiles / 2; ++step) widen(made, step, wide + 2 * kWide * step);
    for (Size row = 0; row < job.rows; row += kBlock) {
        const bool two = job.rows - row > kTile;
        if (channels > kTile)
            two ? block<kNumbers, 2, 2>(job, made, wide, row) : block<kNumbers, 1, 2>(job, made, wide, row);
        else
            two ? block<kNumbers, 2, 1>(job, made, wide, row) : block<kNumbers, 1, 1>(job, made, wide, row);
    }
}

// The first `left` of 32 elements of 2 bytes, and zeros.
INLINE __m512i some(const Byte* at, Size left) {
    return _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1, at);
}

// Rows of x as tiles: pairs of k below each other, as `widen` makes them; zeros behind k and behind the last row.
template <Number kNumbers>
AVX512 void arrange(const Job& job, Byte* out) {
    const Call& call = *job.call;
    const Size apart = 4 * job.columns, rows = (job.rows + job.columns - 1) / job.columns * job.columns;
    const __m512i lanes = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(static_cast<int>(apart)));
    for (Size row = 0; row < rows; ++row) {
        const Byte* x = call.x + 2 * (job.row + row) * call.k;
        Byte* to = out + row / job.columns * job.tiles * kTile * apart + row % job.columns * 4;
        for (Size tile = 0; tile < job.tiles; ++tile, to += kTile * apart) {
            const Size left = row < job.rows ? call.k - tile * kStep : -kStep;  // here and in the tile before
            __m512i values = some(x + 2 * kStep * tile, left);
            if constexpr (kNumbers == kInt8) {
                if (tile % 2 == 0)
                    values = _mm512_shuffle_i64x2(values, some(x + 2 * kStep * (tile + 1), left - kStep), 0x88);
                else
                    values = _mm512_shuffle_i64x2(some(x + 2 * kStep * (tile - 1), left + kStep), values, 0xdd);
            }
            _mm512_i32scatter_epi32(to, lanes, values, 1);
        }
    }
}

struct Shared {
    const Job* job;
    std::atomic<Size> next{0}, thread{0};

    template <Number kNumbers>
    static void run(void* self) {
        auto& shared = *static_cast<Shared*>(self);
        const Job& job = *shared.job;
        const Size channels = job.call->channels;
        Byte* wide = job.wide ? job.wide + shared.thread.fetch_add(1) * job.tiles * kWide : nullptr;
        Shapes before;
        before.keep();
        shapes(kPanel, job.columns).use();
        for (Size begin = shared.next.fetch_add(kPanel), soon; begin < channels; begin = soon) {
            soon = shared.next.fetch_add(kPanel);
            const Size here = std::min(kPanel, channels - begin);
            if (here < kPanel) shapes(here, job.columns).use();  // the last panel
            panel<kNumbers>(job, begin, here, soon < channels ? soon : begin, wide);
        }
        before.use();
    }
};

template <Number kNumbers>
bool linear(const Call& call) {
    const Size threads = useful_threads(call), per_step = 2 / width_of(kNumbers);
    Job job{&call, nullptr, 0, 0, kTile, (call.k + kStep * per_step - 1) / (kStep * per_step) * per_step, nullptr};
    while (job.columns / 2 >= call.rows) job.columns /= 2;
    const Size row_bytes = job.tiles * kStep * 2;
    const Size at_once = std::max(kBlock, kArranged / row_bytes / kBlock * kBlock);
    const Size arranged = (std::min(at_once, call.rows) + job.columns - 1) / job.columns * job.columns * row_bytes;
    const Buffer<Byte> x = buffer<Byte>(arranged);
    Buffer<Byte> wide;
    if (kNumbers == kInt8 && call.rows > kBlock) wide = buffer<Byte>(threads * job.tiles * kWide);
    if (!x || (kNumbers == kInt8 && call.rows > kBlock && !wide)) return false;
    job.x = x.get();
    job.wide = wide.get();
    for (; job.row < call.rows; job.row += at_once) {
        job.rows = std::min(at_once, call.rows - job.row);
        arrange<kNumbers>(job, x.get());
        Shared shared{&job};
        share(Shared::run<kNumbers>, &shared, threads, call.team);
    }
    return true;
}

// Whether processor and system know tiles and bfloat16 in them; AVX512-BF16 has been looked for.
bool has_tiles() {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (1u << 22 | 1u << 23 | 1u << 24)) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 27)) return false;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3u) == 3u;
}

// A process has to ask before it uses the tiles. Refused by old kernels and by some filters of system calls.
bool may_use_tiles() {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

}  // namespace

bool amx_runs() {
    static const bool runs = avx512_runs() && has_tiles() && may_use_tiles();
    return runs;
}

bool amx_linear(const Call& call) {
    if (call.rows == 0 || call.channels == 0) return true;
    return call.numbers == kBfloat16 ? linear<kBfloat16>(call) : linear<kInt8>(call);
}

}  // namespace joinwise::verify_gemm
#endif
