// Linear layers for a few rows: which path computes them, and in which threads. See linear.h.
#include <exception>
#include <thread>
#include <vector>

#include "linear.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace joinwise::verify_gemm {
namespace {

struct Way {
    bool (*runs)();
    Path linear;
};
constexpr Way kWays[] = {{avx2_runs, avx2_linear}, {avx512_runs, avx512_linear}, {amx_runs, amx_linear}};

struct Memory {
    const Byte* begin;
    Size bytes;
    std::atomic<Size> next{0};

    static void run(void* self);
};

#if defined(__x86_64__) && !defined(JOINWISE_PLAIN)
__attribute__((target("avx2"))) void Memory::run(void* self) {
    constexpr Size piece = 1 << 20;
    auto& memory = *static_cast<Memory*>(self);
    for (Size from; (from = memory.next.fetch_add(piece)) < memory.bytes;) {
        const Byte* at = memory.begin + from;
        const Byte* end = memory.begin + std::min(from + piece, memory.bytes);
        __m256i seen[4] = {};
        for (; at + 128 <= end; at += 128)
            for (int i = 0; i < 4; ++i)
                seen[i] = _mm256_or_si256(seen[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * i)));
        for (__m256i& all : seen) __asm__ volatile("" : : "x"(all));  // wanted, as far as the compiler knows
    }
}
#else
void Memory::run(void*) {}
#endif

}  // namespace

void share(void (*work)(void*), void* with, Size threads, Team team) {
    if (threads <= 1) return work(with);
    if (team) return team(work, with, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> started;
    try {
        for (Size i = 1; i < threads; ++i) started.emplace_back(work, with);
    } catch (const std::exception&) {  // done without
    }
    work(with);
    for (std::thread& thread : started) thread.join();
}

}  // namespace joinwise::verify_gemm

using namespace joinwise::verify_gemm;

extern "C" {

// The paths that run here: a bit for each, as `kWays` counts them.
int joinwise_linear_paths() {
    int found = 0, bit = 1;
    for (const Way& way : kWays) {
        if (way.runs()) found |= bit;
        bit *= 2;
    }
    return found;
}

// path: one that runs here; numbers: type of weights; type: of x, bias and y. team: null to start threads here.
// False where there is no memory.
int joinwise_linear(int path, int numbers, int type, const Byte* weights, const float* scale, const Byte* bias,
                    const Byte* x, Byte* y, Size rows, Size channels, Size k, Size threads, Team team) {
    return kWays[path].linear({static_cast<Number>(numbers), static_cast<Number>(type), weights, scale, bias, x, y, rows,
                               channels, k, threads, team});
}

// Reads memory and does nothing with it: what a linear layer is measured against.
void joinwise_read(const Byte* begin, Size bytes, Size threads, Team team) {
    Memory memory{begin, bytes};
    share(Memory::run, &memory, threads, team);
}
}
