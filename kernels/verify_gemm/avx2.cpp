// Linear layers in AVX2 with FMA, for float32, bfloat16 and int8 weights.
//
// The few rows of x are put into the order in which a register of weights comes apart (`Weights`). One register of partial
// sums belongs to each (m, n).
#include "linear.h"

#if !defined(__x86_64__) || defined(JOINWISE_PLAIN)

bool joinwise::verify_gemm::avx2_runs() { return false; }
bool joinwise::verify_gemm::avx2_linear(const Call&) { return false; }

#else
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE __attribute__((target("avx2,fma"), always_inline)) inline

namespace joinwise::verify_gemm {
namespace {

constexpr Size kRows = 4;                  // of x in a tile, at most
constexpr Size kRowsAtMost = 32;           // of x at once
constexpr Size kGroup = 24;                // channels that meet all rows, a chunk at a time, before the next are read
constexpr Size kTogether = 12;             // of them, as many as a chunk's weights stay in the L1 cache for
constexpr Size kChunk = 512;               // elements of k in a chunk
constexpr Size kPiece = 2 * kGroup;        // channels that a thread takes at once, at least
constexpr Size kStep = 32;                 // what the length of an arranged row is rounded up to

// Channels of a tile with so many rows. More tiles' worth of sums would fit into the 16 registers, and be slower.
constexpr int channels_with(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 3 : 2; }

INLINE __m256i load(const Byte* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// How 32 bytes of weights come apart into `parts` registers of 8 float32. In lane i % 8 of part i / 8 lies the element
// `order(i)` of them.
template <Number>
struct Weights;

template <>
struct Weights<kFloat32> {
    static constexpr int parts = 1, width = 4;
    static constexpr int order(int i) { return i; }
    template <int>
    static INLINE __m256 part(const Byte* at) {
        return _mm256_castsi256_ps(load(at));
    }
};

template <>
struct Weights<kBfloat16> {
    static constexpr int parts = 2, width = 2;
    static constexpr int order(int i) { return 2 * (i % 8) + i / 8; }  // the even ones, then the odd ones
    template <int kPart>
    static INLINE __m256 part(const Byte* at) {
        return _mm256_castsi256_ps(kPart == 0 ? _mm256_slli_epi32(load(at), 16)
                                              : _mm256_and_si256(load(at), _mm256_set1_epi32(-65536)));
    }
};

template <>
struct Weights<kInt8> {
    static constexpr int parts = 4, width = 1;
    static constexpr int order(int i) { return i; }
    template <int kPart>
    static INLINE __m256 part(const Byte* at) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * kPart));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    }
};

struct Job {
    Number type;          // of x, bias and y: float32 or bfloat16
    const Byte* weights;  // channels x k
    const float* scale;   // of each channel; null unless weights are int8
    const Byte* bias;     // of each channel, or null
    const float* x;       // rows x stride, in the order of the weights, zeros behind k
    Byte* y;              // rows x channels
    Size rows, stride, channels, k;
};

INLINE float sum(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE __m256 in_register(__m256 value) {
    __asm__("" : "+x"(value));  // and not read, or made, again for each use
    return value;
}

// 32 bytes of each of N rows of weights with M rows of x. Unrolled early, so that `total` is nothing but registers.
template <Number kNumbers, int M, int N, int kPart = 0>
INLINE void step(__m256 (&total)[M][N], const Byte* weights, Size apart, const float* x, Size stride) {
    using W = Weights<kNumbers>;
    __m256 held[M < N ? M : N];
    if constexpr (M < N) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) held[m] = in_register(_mm256_loadu_ps(x + m * stride + 8 * kPart));
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const __m256 w = W::template part<kPart>(weights + n * apart);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) total[m][n] = _mm256_fmadd_ps(w, held[m], total[m][n]);
        }
    } else {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) held[n] = in_register(W::template part<kPart>(weights + n * apart));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m256 here = in_register(_mm256_loadu_ps(x + m * stride + 8 * kPart));
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) total[m][n] = _mm256_fmadd_ps(held[n], here, total[m][n]);
        }
    }
    if constexpr (kPart + 1 < W::parts) step<kNumbers, M, N, kPart + 1>(total, weights, apart, x, stride);
}

// Some elements of the rows of weights, from byte `from` on, with some rows of x.
struct Chunk {
    Size from, bytes;
    bool first, last;
    Size ahead;  // rows from here to the weights that are wanted soon, 0 for none
};

// The chunk's share of y[row ...][channel ...]; `sums` keeps it between chunks.
template <Number kNumbers, int M, int N>
AVX2 void tile(const Job& job, const Chunk& chunk, Size row, Size channel, float* sums) {
    using W = Weights<kNumbers>;
    constexpr Size per_step = 8 * W::parts;
    const Size apart = job.k * W::width, rest = chunk.bytes % 32;
    const Byte* weights = job.weights + channel * apart + chunk.from;
    const float* x = job.x + row * job.stride + chunk.from / W::width;
    __m256 total[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
            total[m][n] = chunk.first ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + (m * N + n) * 8);
    const Byte* end = weights + chunk.bytes - rest;
    if (chunk.ahead) {
        const Byte* soon = weights + chunk.ahead * apart;  // perhaps behind the last: fetching ahead never fails
        for (; weights < end; weights += 32, soon += 32, x += per_step) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) _mm_prefetch(reinterpret_cast<const char*>(soon + n * apart), _MM_HINT_T1);
            step<kNumbers, M, N>(total, weights, apart, x, job.stride);
        }
    } else {
        for (; weights < end; weights += 32, x += per_step)
            step<kNumbers, M, N>(total, weights, apart, x, job.stride);
    }
    if (rest) {
        Byte last[N][32] = {};
        for (int n = 0; n < N; ++n) std::memcpy(last[n], weights + n * apart, rest);
        step<kNumbers, M, N>(total, last[0], 32, x, job.stride);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            if (!chunk.last) {
                _mm256_storeu_ps(sums + (m * N + n) * 8, total[m][n]);
                continue;
            }
            float value = sum(total[m][n]);
            if constexpr (kNumbers == kInt8) value *= job.scale[channel + n];
            if (job.bias) value += number(job.bias, channel + n, job.type);
            put(job.y, (row + m) * job.channels + channel + n, job.type, value);
        }
}

template <Number kNumbers, int M>
AVX2 void tiles(const Job& job, const Chunk& chunk, Size row, Size channel, Size end, float* sums) {
    constexpr int N = channels_with(M);
    for (; channel + N <= end; channel += N, sums += M * N * 8) tile<kNumbers, M, N>(job, chunk, row, channel, sums);
    for (; channel < end; ++channel, sums += M * 8) tile<kNumbers, M, 1>(job, chunk, row, channel, sums);
}

template <Number kNumbers>
AVX2 void block(const Job& job, const Chunk& chunk, Size row, Size rows, Size channel, Size end, float* sums) {
    if (rows == 1) return tiles<kNumbers, 1>(job, chunk, row, channel, end, sums);
    if (rows == 2) return tiles<kNumbers, 2>(job, chunk, row, channel, end, sums);
    if (rows == 3) return tiles<kNumbers, 3>(job, chunk, row, channel, end, sums);
    tiles<kNumbers, 4>(job, chunk, row, channel, end, sums);
}

// What all rows have in some channels.
template <Number kNumbers>
AVX2 void channels(const Job& job, Size begin, Size end) {
    const Size width = Weights<kNumbers>::width, bytes = job.k * width, blocks = (job.rows + kRows - 1) / kRows;
    if (blocks == 1)  // each weight is used once: the next tile's are fetched
        return block<kNumbers>(job, {0, bytes, true, true, channels_with(job.rows)}, 0, job.rows, begin, end, nullptr);
    float sums[kRowsAtMost * kGroup * 8];
    for (Size first = begin; first < end; first += kGroup) {
        const Size last = std::min(first + kGroup, end);
        for (Size from = 0; from < bytes; from += kChunk * width) {
            const Size left = bytes - from;
            Chunk chunk{from, std::min(kChunk * width, left), from == 0, left <= kChunk * width, 0};
            for (Size channel = first; channel < last; channel += kTogether)
                for (Size b = 0; b < blocks; ++b) {
                    const Size row = job.rows * b / blocks, rows = job.rows * (b + 1) / blocks - row;
                    chunk.ahead = b == 0 ? kGroup : 0;
                    block<kNumbers>(job, chunk, row, rows, channel, std::min(channel + kTogether, last),
                                    sums + (row * kGroup + (channel - first) * rows) * 8);
                }
        }
    }
}

template <Number kNumbers>
void arrange(const Byte* x, Number type, Size rows, Size k, Size stride, float* out) {
    constexpr Size per_step = 8 * Weights<kNumbers>::parts;
    const Size whole = k / per_step * per_step;
    for (Size row = 0; row < rows; ++row, x += k * (type == kFloat32 ? 4 : 2), out += stride) {
        for (Size i = 0; i < whole; i += per_step)
            for (int j = 0; j < per_step; ++j) out[i + j] = number(x, i + Weights<kNumbers>::order(j), type);
        for (Size j = whole; j < stride; ++j) {
            const Size i = whole + Weights<kNumbers>::order((j - whole) % per_step);
            out[j] = i < k && j - whole < per_step ? number(x, i, type) : 0.0f;
        }
    }
}

// Work in pieces that threads take in turn, so that a thread that is late, or never comes, holds up nobody.
struct Shared {
    const Job* job;
    void (*work)(const Job&, Size begin, Size end);
    Size piece;
    std::atomic<Size> next{0};

    static void run(void* self) {
        auto& shared = *static_cast<Shared*>(self);
        for (Size begin; (begin = shared.next.fetch_add(shared.piece)) < shared.job->channels;)
            shared.work(*shared.job, begin, std::min(begin + shared.piece, shared.job->channels));
    }
};

template <Number kNumbers>
bool linear(const Call& call) {
    const Size width = width_of(call.type), threads = useful_threads(call);
    const Size stride = (call.k + kStep - 1) / kStep * kStep, each = call.channels / (threads * 8) / kPiece * kPiece;
    const Buffer<float> arranged = buffer<float>(std::min(kRowsAtMost, call.rows) * stride);
    if (!arranged) return false;
    Job job{call.type, call.weights, call.scale, call.bias, arranged.get(), call.y, 0, stride, call.channels, call.k};
    for (Size row = 0; row < call.rows; row += kRowsAtMost, job.y += kRowsAtMost * job.channels * width) {
        job.rows = std::min(kRowsAtMost, call.rows - row);
        arrange<kNumbers>(call.x + row * job.k * width, job.type, job.rows, job.k, stride, arranged.get());
        Shared shared{&job, channels<kNumbers>, threads > 1 ? std::max(each, kPiece) : job.channels};
        share(Shared::run, &shared, threads, call.team);
    }
    return true;
}

}  // namespace

bool avx2_runs() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool avx2_linear(const Call& call) {
    if (call.numbers == kFloat32) return linear<kFloat32>(call);
    if (call.numbers == kBfloat16) return linear<kBfloat16>(call);
    return linear<kInt8>(call);
}

}  // namespace joinwise::verify_gemm
#endif
