// xxh3-64 of pieces of memory as if they were one, copied on the way where asked: each byte is read from memory once.
// Source: "XXH3 Algorithm Overview" in doc/xxhash_spec.md of xxHash (Yann Collet), without a seed, for inputs of more
// than 240 bytes.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>

#if defined(__x86_64__) && !defined(JOINWISE_PLAIN)
#include <immintrin.h>
#define JOINWISE_AVX2 __attribute__((target("avx2")))
#endif

namespace joinwise::kv_hash {
namespace {

using Byte = std::uint8_t;
using Size = std::int64_t;
using U64 = std::uint64_t;

constexpr Size kStripe = 64;           // bytes that the accumulators take in at once
constexpr Size kStripesPerBlock = 16;  // for which the secret lasts, 8 bytes on for each
constexpr U64 kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr U64 kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
              kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5, kPrimeMx1 = 0x165667919E3779F9;

alignas(64) constexpr Byte kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
constexpr const Byte* kScramble = kSecret + sizeof kSecret - kStripe;
constexpr const Byte* kLast = kScramble - 7;
constexpr const Byte* kMerge = kSecret + 11;

U64 load(const Byte* at) {
    U64 value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// Takes in `count` stripes with the secret from `secret` on, and copies them to `target` unless that is null.
using Take = void (*)(U64* sums, const Byte* source, Byte* target, Size count, const Byte* secret);

void take_plain(U64* sums, const Byte* source, Byte* target, Size count, const Byte* secret) {
    for (Size n = 0; n < count; ++n, source += kStripe, secret += 8) {
        Byte stripe[kStripe];  // what is summed is what is copied, whatever becomes of the source meanwhile
        std::memcpy(stripe, source, kStripe);
        for (int i = 0; i < 8; ++i) {
            const U64 value = load(stripe + 8 * i), key = value ^ load(secret + 8 * i);
            sums[i ^ 1] += value;
            sums[i] += (key & 0xFFFFFFFF) * (key >> 32);
        }
        if (target) std::memcpy(target + n * kStripe, stripe, kStripe);
    }
}

#ifdef JOINWISE_AVX2
enum class Copy { kNone, kCached, kAround };

constexpr Size kAhead = 2048;  // bytes; the processor's own looking ahead ends at each page

JOINWISE_AVX2 inline __m256i taken(__m256i sums, __m256i value, const Byte* secret) {
    const __m256i key = _mm256_xor_si256(value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
    const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(sums, _mm256_add_epi64(product, swapped));
}

template <Copy kHow>
JOINWISE_AVX2 inline void put(Byte* at, __m256i value) {
    if constexpr (kHow == Copy::kCached) _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value);
    if constexpr (kHow == Copy::kAround) _mm256_stream_si256(reinterpret_cast<__m256i*>(at), value);
}

template <Copy kHow>
JOINWISE_AVX2 void take_avx2(U64* sums, const Byte* source, Byte* target, Size count, const Byte* secret) {
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums));
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + 4));
    for (Size n = 0; n < count; ++n, source += kStripe, target += kStripe, secret += 8) {
        _mm_prefetch(source + kAhead, _MM_HINT_T0);
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + 32));
        put<kHow>(target, first);
        put<kHow>(target + 32, second);
        low = taken(low, first, secret);
        high = taken(high, second, secret + 32);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 4), high);
}
#endif

Take best(const Byte* target, bool around) {
#ifdef JOINWISE_AVX2
    static const bool has_avx2 = __builtin_cpu_supports("avx2");
    if (has_avx2) {
        if (!target) return take_avx2<Copy::kNone>;
        return around && reinterpret_cast<std::uintptr_t>(target) % 32 == 0 ? take_avx2<Copy::kAround>
                                                                            : take_avx2<Copy::kCached>;
    }
#endif
    return (void)target, (void)around, take_plain;
}

class Hash {
public:
    explicit Hash(Size total) : total_(total), left_((total - 1) / kStripe) {}

    void add(const Byte* source, Byte* target, Size size, bool around) {
        if (held_ > 0) {
            const Size part = std::min(size, kStripe - held_);
            hold(source, target, part);
            source += part, target += target ? part : 0, size -= part;
            if (held_ == kStripe && left_ > 0) {
                stripes(stripe_, nullptr, 1, best(nullptr, false));
                std::memcpy(before_, stripe_, kStripe);
                held_ = 0;
            }
        }
        if (const Size count = std::min(size / kStripe, left_); count > 0) {
            stripes(source, target, count, best(target, around));
            const Size taken = count * kStripe;
            std::memcpy(before_, (target ? target : source) + taken - kStripe, kStripe);
            source += taken, target += target ? taken : 0, size -= taken;
        }
        hold(source, target, size);
    }

    U64 digest() {
        Byte last[kStripe];  // of the whole, some of which may have been taken in
        std::memcpy(last, before_ + held_, kStripe - held_);
        std::memcpy(last + kStripe - held_, stripe_, held_);
        take_plain(sums_, last, nullptr, 1, kLast);
        U64 result = static_cast<U64>(total_) * kPrime64_1;
        for (int i = 0; i < 8; i += 2) {
            const auto product = static_cast<unsigned __int128>(sums_[i] ^ load(kMerge + 8 * i)) *
                                 (sums_[i + 1] ^ load(kMerge + 8 * i + 8));
            result += static_cast<U64>(product) ^ static_cast<U64>(product >> 64);
        }
        result = (result ^ result >> 37) * kPrimeMx1;
        return result ^ result >> 32;
    }

private:
    void hold(const Byte* source, Byte* target, Size size) {
        if (size == 0) return;
        std::memcpy(stripe_ + held_, source, size);
        if (target) std::memcpy(target, stripe_ + held_, size);
        held_ += size;
    }

    void stripes(const Byte* source, Byte* target, Size count, Take take) {
        left_ -= count;
        while (count > 0) {
            const Size now = std::min(count, kStripesPerBlock - in_block_);
            take(sums_, source, target, now, kSecret + 8 * in_block_);
            source += now * kStripe, target += target ? now * kStripe : 0, count -= now;
            if ((in_block_ += now) == kStripesPerBlock) {
                in_block_ = 0;
                for (int i = 0; i < 8; ++i)
                    sums_[i] = (sums_[i] ^ sums_[i] >> 47 ^ load(kScramble + 8 * i)) * kPrime32_1;
            }
        }
    }

    U64 sums_[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
    Byte stripe_[kStripe];  // bytes of a stripe that is not whole, or is the last
    Byte before_[kStripe];  // the stripe taken in last
    Size total_, left_, in_block_ = 0, held_ = 0;
};

}  // namespace
}  // namespace joinwise::kv_hash

using namespace joinwise::kv_hash;

// sources: addresses of `count` pieces, more than 240 bytes together; sizes: bytes of each; targets: where each is
// copied to, or null for no copy; around: write around the processor's caches.
extern "C" U64 joinwise_kv_hash(const Byte* const* sources, const Size* sizes, Byte* const* targets, Size count,
                                int around) {
    Hash hash(std::accumulate(sizes, sizes + count, Size{0}));
    for (Size i = 0; i < count; ++i) hash.add(sources[i], targets ? targets[i] : nullptr, sizes[i], around);
    if (around) std::atomic_thread_fence(std::memory_order_seq_cst);  // also orders what went around the caches
    return hash.digest();
}
