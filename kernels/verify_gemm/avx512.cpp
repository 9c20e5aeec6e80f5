// Linear layers in AVX512-BF16 (Cooper Lake, Zen 4 and later): rows of x and weights in bfloat16 as they are, or weights in
// int8 that are widened to it, exactly, in registers. One register of partial sums belongs to each (m, n).
//
// The instruction takes denormal numbers for zeros, in what it multiplies and in its sums.
#include "linear.h"

#if !defined(__x86_64__) || defined(JOINWISE_PLAIN) || !defined(__GNUC__) || (!defined(__clang__) && __GNUC__ < 10)

bool joinwise::verify_gemm::avx512_runs() { return false; }
bool joinwise::verify_gemm::avx512_linear(const Call&) { return false; }

#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own headers, of values that are wholly overwritten
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"), always_inline)) inline

namespace joinwise::verify_gemm {
namespace {

constexpr int kRows = 8;       // of x in a tile, at most
constexpr Size kStep = 32;     // elements of k in a register
constexpr Size kPiece = 48;    // channels that a thread takes at once, at least

// Channels of a tile with so many rows: their sums, weights and a register of x fit into the 32 registers.
constexpr int channels_with(int rows) { return rows <= 2 ? 8 : rows == 3 ? 6 : rows <= 5 ? 4 : 3; }

INLINE __m512bh as_bfloat16(__m512i bits) {
    __m512bh same;
    std::memcpy(&same, &bits, sizeof same);
    return same;
}

INLINE __m512bh whole(const Byte* at) { return as_bfloat16(_mm512_loadu_si512(at)); }
INLINE __m512bh part(const Byte* at, __mmask32 here) { return as_bfloat16(_mm512_maskz_loadu_epi16(here, at)); }

// 32 weights.
template <Number kNumbers>
INLINE __m512bh weights_at(const Byte* at, __mmask32 here, bool all) {
    if constexpr (kNumbers == kBfloat16) return all ? whole(at) : part(at, here);
    const __m256i codes =
        all ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)) : _mm256_maskz_loadu_epi8(here, at);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return _mm512_cvtne2ps_pbh(high, low);
}

template <Number kNumbers, int M, int N>
INLINE void step(__m512 (&total)[M][N], const Byte* weights, Size apart, const Byte* x, Size x_apart, __mmask32 here,
                 bool all) {
    __m512bh held[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) held[n] = weights_at<kNumbers>(weights + n * apart, here, all);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const __m512bh row = all ? whole(x + m * x_apart) : part(x + m * x_apart, here);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[m][n] = _mm512_dpbf16_ps(total[m][n], row, held[n]);
    }
}

// y[row ...][channel ...] of M rows and N channels. `ahead`: the weights that are wanted next lie so many bytes on, 0 for none.
template <Number kNumbers, int M, int N>
AVX512 void tile(const Call& call, Size row, Size channel, Size ahead) {
    constexpr Size step_bytes = kStep * width_of(kNumbers);
    const Size apart = call.k * width_of(kNumbers), x_apart = 2 * call.k, rest = call.k % kStep;
    const Byte* weights = call.weights + channel * apart;
    const Byte* x = call.x + row * x_apart;
    __m512 total[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[m][n] = _mm512_setzero_ps();
    const Byte* end = weights + apart - rest * width_of(kNumbers);
    for (; weights < end; weights += step_bytes, x += 2 * kStep) {
        if (ahead) {  // perhaps behind the last: fetching ahead never fails
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n)
                _mm_prefetch(reinterpret_cast<const char*>(weights + n * apart + ahead), _MM_HINT_T1);
        }
        step<kNumbers, M, N>(total, weights, apart, x, x_apart, 0, true);
    }
    if (rest) step<kNumbers, M, N>(total, weights, apart, x, x_apart, (1u << rest) - 1, false);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            float value = _mm512_reduce_add_ps(total[m][n]);
            if constexpr (kNumbers == kInt8) value *= call.scale[channel + n];
            if (call.bias) value += number(call.bias, channel + n, kBfloat16);
            put(call.y, (row + m) * call.channels + channel + n, kBfloat16, value);
        }
}

// What `rows` <= 8 rows from `row` on have in some channels.
template <Number kNumbers, int M>
AVX512 void tiles(const Call& call, Size row, Size channel, Size end, bool first) {
    constexpr int N = channels_with(M);
    const Size ahead = first ? N * call.k * width_of(kNumbers) : 0;
    for (; channel + N <= end; channel += N) tile<kNumbers, M, N>(call, row, channel, ahead);
    for (; channel < end; ++channel) tile<kNumbers, M, 1>(call, row, channel, 0);
}

template <Number kNumbers>
AVX512 void block(const Call& call, Size row, Size rows, Size channel, Size end, bool first) {
    using Tiles = void (*)(const Call&, Size, Size, Size, bool);
    constexpr Tiles by_rows[kRows] = {tiles<kNumbers, 1>, tiles<kNumbers, 2>, tiles<kNumbers, 3>, tiles<kNumbers, 4>,
                                      tiles<kNumbers, 5>, tiles<kNumbers, 6>, tiles<kNumbers, 7>, tiles<kNumbers, 8>};
    by_rows[rows - 1](call, row, channel, end, first);
}

struct Shared {
    const Call* call;
    Size piece;
    std::atomic<Size> next{0};

    template <Number kNumbers>
    static void run(void* self) {
        constexpr Size group = 12;  // channels that meet all rows before the next are read
        auto& shared = *static_cast<Shared*>(self);
        const Call& call = *shared.call;
        const Size blocks = (call.rows + kRows - 1) / kRows;
        for (Size begin; (begin = shared.next.fetch_add(shared.piece)) < call.channels;) {
            const Size end = std::min(begin + shared.piece, call.channels), each = blocks == 1 ? end - begin : group;
            for (Size channel = begin; channel < end; channel += each)
                for (Size b = 0; b < blocks; ++b) {
                    const Size row = call.rows * b / blocks, rows = call.rows * (b + 1) / blocks - row;
                    block<kNumbers>(call, row, rows, channel, std::min(channel + each, end), b == 0);
                }
        }
    }
};

}  // namespace

bool avx512_runs() {
    return avx2_runs() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

bool avx512_linear(const Call& call) {
    const Size threads = useful_threads(call), each = call.channels / (threads * 8) / kPiece * kPiece;
    Shared shared{&call, threads > 1 ? std::max(each, kPiece) : call.channels};
    if (call.rows == 0 || call.channels == 0) return true;
    share(call.numbers == kBfloat16 ? Shared::run<kBfloat16> : Shared::run<kInt8>, &shared, threads, call.team);
    return true;
}

}  // namespace joinwise::verify_gemm
#endif
