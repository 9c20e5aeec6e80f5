// Rows of numbers to rows of one-byte codes and back, and 16-bit numbers to two planes of bytes and back.
//
// The plain C interface is called by `native_calls.py`, which has checked every size. The meaning of each step is in
// `reference.py`; the bits are the same as there. So no multiplication may be fused with an addition: `setup.py` says
// -ffp-contract=off. Loops have no branches and one type size each, for the compiler to vectorise; they are compiled
// twice on x86-64, once for AVX2. Pointers may be unaligned.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#define JOINWISE_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && !defined(JOINWISE_PLAIN)
#define JOINWISE_AVX2 __attribute__((target("avx2")))
#endif

namespace joinwise::kv_codec {
namespace {

using Byte = std::uint8_t;
using Size = std::int64_t;
using Bits = std::uint32_t;
using Signed = std::int32_t;

constexpr float kSmallest = 0x1p-100f, kLimit = 0x1p127f;
constexpr Size kWorthAThread = 1 << 18, kBlock = 256;  // numbers

template <typename To, typename From>
JOINWISE_INLINE To cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename T>
JOINWISE_INLINE T load(const Byte* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <typename T>
JOINWISE_INLINE void store(Byte* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

// left < right ? a : b, both under 2^31. As `?:` it would be a branch: the compiler computes nothing in vain that could
// trap, as a float addition could. Signed, because AVX2 compares nothing else.
JOINWISE_INLINE Bits if_less(Bits left, Bits right, Bits a, Bits b) {
    const Bits mask = -static_cast<Bits>(static_cast<Signed>(left) < static_cast<Signed>(right));
    return (a & mask) | (b & ~mask);
}

// ---- element types: signed integers, so that the largest magnitude of a row is the largest integer without sign ------

struct Float32 {
    using Raw = std::int32_t;
    static constexpr Raw kInfinity = 0x7f800000;
    static constexpr bool kStaged = false;
    static JOINWISE_INLINE float widen(Raw finite) { return cast<float>(finite); }
    static JOINWISE_INLINE Bits narrow(float value) { return cast<Bits>(value); }
};

struct Bfloat16 {
    using Raw = std::int16_t;
    static constexpr Raw kInfinity = 0x7f80;
    static constexpr bool kStaged = false;
    static JOINWISE_INLINE float widen(Raw raw) { return cast<float>(static_cast<Bits>(raw) << 16); }
    static JOINWISE_INLINE Bits narrow(float value) {
        const Bits bits = cast<Bits>(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
        return if_less(0x7f800000, bits & 0x7fffffff, 0x7fc00000, rounded) >> 16;
    }
};

struct Float16 {
    using Raw = std::int16_t;
    static constexpr Raw kInfinity = 0x7c00;
    static constexpr bool kStaged = true;
    static constexpr Bits kRebias = 112u << 23;  // from float16's exponents to float32's

    static JOINWISE_INLINE float widen(Raw raw) {
        const Bits wide = static_cast<Bits>(raw & 0x7fff) << 13, normal = wide + kRebias;
        // Zero and subnormal: a fraction behind a leading one, less that one.
        const Bits small = cast<Bits>(cast<float>(normal + (1u << 23)) - 0x1p-14f);
        return cast<float>(if_less(wide, 1u << 23, small, normal) | static_cast<Bits>(raw & 0x8000) << 16);
    }
    static JOINWISE_INLINE Bits narrow(float value) {
        const Bits bits = cast<Bits>(value), size = bits & 0x7fffffff;
        const Bits most = std::min<Signed>(size, 143u << 23);  // becomes infinity
        const Bits normal = (most - kRebias + 0xfff + (most >> 13 & 1)) >> 13;
        const Bits small = cast<Bits>(cast<float>(size) + 0.5f) - cast<Bits>(0.5f);  // rounds to multiples of 2^-24
        const Bits quiet = if_less(0x7f800000, size, 0x200, 0);                      // infinity to NaN
        return if_less(size, 113u << 23, small, normal) | quiet | (bits >> 16 & 0x8000);
    }
};

// ---- codes -----------------------------------------------------------------------------------------------------

struct Int8 {
    static constexpr float kTop = 127;
    static constexpr bool kStaged = false;
    // 1.5 * 2^23 leaves no room for a fraction: the addition rounds to nearest even, into the low bits.
    static JOINWISE_INLINE Bits encode(float scaled) { return cast<Bits>(scaled + 0x1.8p23f); }
    static JOINWISE_INLINE float decode(Byte code) { return static_cast<float>(static_cast<std::int8_t>(code)); }
};

struct Fp8 {  // e4m3fn: bias 7, no infinity, 0x7f is NaN
    static constexpr float kTop = 448;
    static constexpr bool kStaged = true;
    static JOINWISE_INLINE Bits encode(float scaled) {
        const Bits bits = cast<Bits>(scaled), size = bits & 0x7fffffff;
        // The power of two of the leading bit, from the smallest normal one on, times 2^20: adding it rounds to three
        // bits behind the leading one, and the sum's low bits are those four (less, where the result is subnormal).
        const Bits power = std::max<Signed>(size & 0x7f800000, 121 << 23), shift = power + (20u << 23);
        const Bits rounded = cast<Bits>(cast<float>(size) + cast<float>(shift)) - shift;
        return ((power >> 20) - (121u << 3) + rounded) | (bits >> 24 & 0x80);
    }
    static JOINWISE_INLINE float decode(Byte code) {
        const Bits wide = static_cast<Bits>(code & 0x7f) << 20, normal = wide + (120u << 23);
        const Bits small = cast<Bits>(cast<float>(normal + (1u << 23)) - 0x1p-6f);
        const Bits bits = if_less(wide, 1u << 23, small, if_less(wide, 0x7f00000, normal, 0x7fc00000));
        return cast<float>(bits | static_cast<Bits>(code & 0x80) << 24);
    }
};

// ---- rows ------------------------------------------------------------------------------------------------------

struct Rows {
    Byte *numbers, *scales, *codes;
    Size rows, head_dim;
};

// Writes count numbers. Staged, they are computed in one loop and made narrow in another: the compiler would otherwise
// compute as many at a time as fill a register in the end, and run out of registers if there is much to compute.
template <typename To, bool staged, typename Compute>
JOINWISE_INLINE void convert(Size count, Byte* __restrict out, Compute compute) {
    if constexpr (!staged) {
        for (Size i = 0; i < count; ++i) store(out + i * sizeof(To), static_cast<To>(compute(i)));
    } else {
        Bits block[kBlock];
        for (Size at = 0, end; at < count; at = end) {
            end = std::min(at + kBlock, count);
            for (Size i = at; i < end; ++i) block[i - at] = compute(i);
            for (Size i = at; i < end; ++i) store(out + i * sizeof(To), static_cast<To>(block[i - at]));
        }
    }
}

template <class Number, class Code>
JOINWISE_INLINE void encode_rows(const Rows& of) {
    using Raw = typename Number::Raw;
    constexpr Raw kNoSign = std::numeric_limits<Raw>::max();
    const Size dim = of.head_dim;
    for (Size row = 0; row < of.rows; ++row) {
        const Byte* __restrict in = of.numbers + row * dim * sizeof(Raw);
        Byte* __restrict out = of.codes + row * dim;
        Raw peak = 0;
        for (Size i = 0; i < dim; ++i)
            peak = std::max(peak, static_cast<Raw>(load<Raw>(in + i * sizeof(Raw)) & kNoSign));
        const float most = peak < Number::kInfinity ? Number::widen(peak) : kLimit;
        if (most < kSmallest || most >= kLimit) {
            store(of.scales + row * 4, most < kSmallest ? 0.0f : cast<float>(Bits{0x7fc00000}));
            std::memset(out, 0, dim);
            continue;
        }
        store(of.scales + row * 4, most / Code::kTop);
        const float factor = Code::kTop / most;
        convert<Byte, Code::kStaged>(
            dim, out, [=](Size i) __attribute__((always_inline)) { return Code::encode(Number::widen(load<Raw>(in + i * sizeof(Raw))) * factor); });
    }
}

template <class Number, class Code>
JOINWISE_INLINE void decode_rows(const Rows& of) {
    using Raw = typename Number::Raw;
    const Size dim = of.head_dim;
    for (Size row = 0; row < of.rows; ++row) {
        const Byte* __restrict in = of.codes + row * dim;
        Byte* __restrict out = of.numbers + row * dim * sizeof(Raw);
        const float scale = load<float>(of.scales + row * 4);
        convert<Raw, Number::kStaged>(dim, out,
                                      [=](Size i) __attribute__((always_inline)) { return Number::narrow(Code::decode(in[i]) * scale); });
    }
}

// Here `numbers` is of 16 bits, `scales` the high and `codes` the low bytes of each, turned left by one bit.
JOINWISE_INLINE void split_rows(const Rows& of) {
    const Byte* __restrict in = of.numbers;
    Byte *__restrict high = of.scales, *__restrict low = of.codes;
    for (Size i = 0, end = of.rows * of.head_dim; i < end; ++i) {
        const auto bits = load<std::uint16_t>(in + i * 2);
        high[i] = static_cast<Byte>(bits >> 7);
        low[i] = static_cast<Byte>(bits << 1 | bits >> 15);
    }
}

JOINWISE_INLINE void join_rows(const Rows& of) {
    const Byte *__restrict high = of.scales, *__restrict low = of.codes;
    Byte* __restrict out = of.numbers;
    for (Size i = 0, end = of.rows * of.head_dim; i < end; ++i) {
        const std::uint16_t bits = static_cast<std::uint16_t>(high[i] << 8 | low[i]);
        store(out + i * 2, static_cast<std::uint16_t>(bits >> 1 | bits << 15));
    }
}

// ---- the choice ------------------------------------------------------------------------------------------------

using Work = void (*)(const Rows&);

template <void (*work)(const Rows&)>
void plain(const Rows& of) {
    work(of);
}

#ifdef JOINWISE_AVX2
template <void (*work)(const Rows&)>
JOINWISE_AVX2 void avx2(const Rows& of) {
    work(of);
}
#endif

template <void (*work)(const Rows&)>
Work best() {
#ifdef JOINWISE_AVX2
    if (__builtin_cpu_supports("avx2")) return avx2<work>;
#endif
    return plain<work>;
}

template <class Number>
Work pick(bool encode, int code) {
    if (code == 0) return encode ? best<encode_rows<Number, Int8>>() : best<decode_rows<Number, Int8>>();
    return encode ? best<encode_rows<Number, Fp8>>() : best<decode_rows<Number, Fp8>>();
}

Work pick(bool encode, int code, int number) {
    if (number == 0) return pick<Float32>(encode, code);
    return number == 1 ? pick<Bfloat16>(encode, code) : pick<Float16>(encode, code);
}

// Shares the rows among threads, this one too. A thread that cannot be started is done without.
void share(Work work, const Rows& all, Size number_size, Size threads) {
    threads = std::min(threads, all.rows * all.head_dim / kWorthAThread);
    if (threads <= 1) return work(all);
    const auto piece = [&](Size from, Size to) {
        return Rows{all.numbers + from * all.head_dim * number_size, all.scales + from * 4,
                    all.codes + from * all.head_dim, to - from, all.head_dim};
    };
    std::vector<std::thread> started;
    started.reserve(threads);
    Size from = 0;
    try {
        for (Size left = threads; left > 1; --left) {
            const Size to = from + (all.rows - from) / left;
            started.emplace_back(work, piece(from, to));
            from = to;
        }
    } catch (const std::system_error&) {
    }
    work(piece(from, all.rows));
    for (std::thread& thread : started) thread.join();
}

}  // namespace
}  // namespace joinwise::kv_codec

using namespace joinwise::kv_codec;

extern "C" {

// code: 0 int8, 1 fp8 (e4m3fn). number: 0 float32, 1 bfloat16, 2 float16.
void joinwise_kv_code(int encode, int code, int number, Byte* numbers, Byte* scales, Byte* codes, Size rows,
                      Size head_dim, Size threads) {
    share(pick(encode, code, number), {numbers, scales, codes, rows, head_dim}, number == 0 ? 4 : 2, threads);
}

void joinwise_kv_split(Byte* numbers, Byte* high, Byte* low, Size count) {
    best<split_rows>()({numbers, high, low, 1, count});
}

void joinwise_kv_join(Byte* numbers, Byte* high, Byte* low, Size count) {
    best<join_rows>()({numbers, high, low, 1, count});
}
}
