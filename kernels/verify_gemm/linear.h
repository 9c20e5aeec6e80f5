// What the paths of verify_gemm share: y[m][n] = scale[n] * sum over k of x[m][k] * weight[n][k] + bias[n].
//
// Weights stay in the rows that they came in, so that nobody needs a second copy. On every path a sum belongs to one
// (m, n) and takes in k in the same order whatever is computed beside it: a row's result depends on that row alone.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace joinwise::verify_gemm {

using Size = std::int64_t;
using Byte = std::uint8_t;

// `GOMP_parallel` of an OpenMP that is loaded: runs `work` in up to `threads` threads, this one too.
using Team = void (*)(void (*work)(void*), void* with, unsigned threads, unsigned flags);

enum Number : int { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };
constexpr Size width_of(Number type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

struct Call {
    Number numbers;       // type of weights
    Number type;          // of x, bias and y: float32 or bfloat16
    const Byte* weights;  // channels x k
    const float* scale;   // of each channel; null unless weights are int8
    const Byte* bias;     // of each channel, or null
    const Byte* x;        // rows x k
    Byte* y;              // rows x channels
    Size rows, channels, k, threads;
    Team team;
};

// The ways to compute it, better ones last. False: no memory, nothing was computed.
using Path = bool (*)(const Call&);
bool avx2_linear(const Call&);
bool avx512_linear(const Call&);  // x in bfloat16, weights in bfloat16 or int8
bool amx_linear(const Call&);     // the same
// Whether this processor, and its system, let them run.
bool avx2_runs();
bool avx512_runs();
bool amx_runs();

// Runs `work` in `threads` threads: those of `team`, or, if that is null, some of its own.
void share(void (*work)(void*), void* with, Size threads, Team team);

// Threads that are worth their start: another one for each so many bytes of weights.
inline Size useful_threads(const Call& call) {
    constexpr Size worth = 128 << 10;
    return std::max<Size>(1, std::min(call.threads, call.channels * call.k * width_of(call.numbers) / worth));
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// On a cache line's edge; null where there is no memory.
template <typename T>
Buffer<T> buffer(Size count) {
    const Size bytes = (count * static_cast<Size>(sizeof(T)) + 63) / 64 * 64;
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, static_cast<std::size_t>(std::max<Size>(bytes, 64)))));
}

inline float number(const Byte* at, Size i, Number type) {
    float value;
    if (type == kFloat32) {
        std::memcpy(&value, at + 4 * i, 4);
        return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, at + 2 * i, 2);
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline void put(Byte* at, Size i, Number type, float value) {
    if (type == kFloat32) {
        std::memcpy(at + 4 * i, &value, 4);
        return;
    }
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = value != value ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // NaN stays, and is quiet
    const auto narrow = static_cast<std::uint16_t>(bits);
    std::memcpy(at + 2 * i, &narrow, 2);
}

}  // namespace joinwise::verify_gemm
