#include "leaves.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && !defined(JOINWISE_PLAIN)
#include <immintrin.h>
#define JOINWISE_AVX2 __attribute__((target("avx2,f16c")))
#endif

namespace joinwise::kv_pack {
namespace {

template <typename T>
T load(const Byte* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <typename T>
void store(Byte* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

// ---- the numbers -----------------------------------------------------------------------------------------------

float widen_bfloat16(std::uint16_t bits) {
    std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

std::uint16_t narrow_bfloat16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);  // a quiet NaN
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float widen_float16(std::uint16_t bits) {
    std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    std::uint32_t exponent = bits >> 10 & 0x1fu, fraction = bits & 0x3ffu, wide;
    if (exponent == 31) {
        wide = 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u);
    } else if (exponent != 0) {
        wide = (exponent + 112) << 23 | fraction << 13;
    } else {  // zero or subnormal: fraction * 2^-24, exact
        float small = static_cast<float>(fraction) * 0x1p-24f;
        std::memcpy(&wide, &small, sizeof wide);
    }
    wide |= sign;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

std::uint16_t narrow_float16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    std::uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    std::uint32_t half;
    if (bits > 0x7f800000u) {
        half = 0x7e00u | (bits >> 13 & 0x3ffu);
    } else if (bits >= 0x477ff000u) {  // rounds to 65536 or more
        half = 0x7c00u;
    } else if (bits >= 0x38800000u) {
        half = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
    } else if (bits > 0x33000000u) {  // subnormal: shift the fraction with its leading one, round to even
        std::uint32_t shift = 126 - (bits >> 23), fraction = (bits & 0x7fffffu) | 0x800000u;
        std::uint32_t kept = fraction >> shift, rest = fraction & ((1u << shift) - 1), middle = 1u << (shift - 1);
        half = kept + (rest > middle || (rest == middle && (kept & 1u)));
    } else {
        half = 0;
    }
    return static_cast<std::uint16_t>(sign | half);
}

template <Float F>
float read_number(const Byte* at) {
    if constexpr (F == kFloat32) return load<float>(at);
    if constexpr (F == kBfloat16) return widen_bfloat16(load<std::uint16_t>(at));
    if constexpr (F == kFloat16) return widen_float16(load<std::uint16_t>(at));
}

template <Float F>
void write_number(Byte* at, float value) {
    if constexpr (F == kFloat32) store(at, value);
    if constexpr (F == kBfloat16) store(at, narrow_bfloat16(value));
    if constexpr (F == kFloat16) store(at, narrow_float16(value));
}

template <Float F>
constexpr Size width = F == kFloat32 ? 4 : 2;

// ---- plain loops, for every processor ----------------------------------------------------------------------------

void copy_rows(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows, Size row_bytes) {
    if (source_stride == row_bytes && target_stride == row_bytes) {
        std::memcpy(target, source, rows * row_bytes);
        return;
    }
    for (Size row = 0; row < rows; ++row)
        std::memcpy(target + row * target_stride, source + row * source_stride, row_bytes);
}

template <typename T>
void transpose_edge(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size first_row, Size rows,
                    Size first_column, Size columns) {
    for (Size r = first_row; r < rows; ++r)
        for (Size c = first_column; c < columns; ++c)
            store(target + c * target_stride + r * sizeof(T), load<T>(source + r * source_stride + c * sizeof(T)));
}

template <typename T>
void transpose(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows, Size columns) {
    constexpr Size tile = 16;
    for (Size c = 0; c < columns; c += tile)
        for (Size r = 0; r < rows; r += tile)
            transpose_edge<T>(source, source_stride, target, target_stride, r, std::min(rows, r + tile), c,
                              std::min(columns, c + tile));
}

template <Float From, Float To>
void convert_rows(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows, Size count) {
    for (Size row = 0; row < rows; ++row)
        for (Size i = 0; i < count; ++i)
            write_number<To>(target + row * target_stride + i * width<To>,
                             read_number<From>(source + row * source_stride + i * width<From>));
}

#if defined(__x86_64__) && !defined(JOINWISE_PLAIN)
// ---- AVX2 --------------------------------------------------------------------------------------------------------

JOINWISE_AVX2 void copy_rows_avx2(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows,
                                  Size row_bytes) {
    if (row_bytes % 32 != 0 || row_bytes > 1024 || (source_stride == row_bytes && target_stride == row_bytes)) {
        copy_rows(source, source_stride, target, target_stride, rows, row_bytes);
        return;
    }
    for (Size row = 0; row < rows; ++row, source += source_stride, target += target_stride)
        for (Size i = 0; i < row_bytes; i += 32) {
            __m256i piece = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), piece);
        }
}

// The two 16-byte pieces as one register.
JOINWISE_AVX2 inline __m256i load_two(const Byte* low, const Byte* high) {
    __m256i joined = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    return _mm256_inserti128_si256(joined, _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// 16 rows of 8 columns: an 8 x 8 transpose in each half of eight registers.
JOINWISE_AVX2 inline void transpose2_tile(const Byte* source, Size source_stride, Byte* target, Size target_stride) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = load_two(source + i * source_stride, source + (i + 8) * source_stride);
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi32(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi32(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi32(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi32(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        Byte* row = target + 2 * i * target_stride;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm256_unpacklo_epi64(a[i], a[i + 4]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + target_stride), _mm256_unpackhi_epi64(a[i], a[i + 4]));
    }
}

// 8 rows of 8 columns.
JOINWISE_AVX2 inline void transpose4_tile(const Byte* source, Size source_stride, Byte* target, Size target_stride) {
    for (int half = 0; half < 2; ++half, source += 16, target += 4 * target_stride) {
        __m256i a[4];
        for (int i = 0; i < 4; ++i) a[i] = load_two(source + i * source_stride, source + (i + 4) * source_stride);
        __m256i b0 = _mm256_unpacklo_epi32(a[0], a[1]), b1 = _mm256_unpackhi_epi32(a[0], a[1]);
        __m256i b2 = _mm256_unpacklo_epi32(a[2], a[3]), b3 = _mm256_unpackhi_epi32(a[2], a[3]);
        __m256i* row = reinterpret_cast<__m256i*>(target);
        auto next = [&](int i) { return reinterpret_cast<__m256i*>(target + i * target_stride); };
        _mm256_storeu_si256(row, _mm256_unpacklo_epi64(b0, b2));
        _mm256_storeu_si256(next(1), _mm256_unpackhi_epi64(b0, b2));
        _mm256_storeu_si256(next(2), _mm256_unpacklo_epi64(b1, b3));
        _mm256_storeu_si256(next(3), _mm256_unpackhi_epi64(b1, b3));
    }
}

// By cache lines of the source: a line is read once, and the few rows of the target that it feeds stay at hand.
template <typename T>
JOINWISE_AVX2 void transpose_avx2(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows,
                                  Size columns) {
    constexpr Size tile_rows = sizeof(T) == 2 ? 16 : 8, tile_columns = 8, line = 64 / sizeof(T);
    const Size whole_rows = rows - rows % tile_rows, whole_columns = columns - columns % tile_columns;
    for (Size first = 0; first < whole_columns; first += line)
        for (Size r = 0; r < whole_rows; r += tile_rows)
            for (Size c = first; c < std::min(whole_columns, first + line); c += tile_columns) {
                const Byte* from = source + r * source_stride + c * sizeof(T);
                Byte* to = target + c * target_stride + r * sizeof(T);
                if constexpr (sizeof(T) == 2)
                    transpose2_tile(from, source_stride, to, target_stride);
                else
                    transpose4_tile(from, source_stride, to, target_stride);
            }
    transpose_edge<T>(source, source_stride, target, target_stride, whole_rows, rows, 0, columns);
    transpose_edge<T>(source, source_stride, target, target_stride, 0, whole_rows, whole_columns, columns);
}

template <Float F>
JOINWISE_AVX2 inline __m256 read_eight(const Byte* at) {
    if constexpr (F == kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if constexpr (F == kFloat16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <Float F>
JOINWISE_AVX2 inline void write_eight(Byte* at, __m256 value) {
    if constexpr (F == kFloat32) {
        _mm256_storeu_ps(reinterpret_cast<float*>(at), value);
    } else if constexpr (F == kFloat16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {
        const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
        const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
        const __m256i chosen = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, _mm256_castps_si256(is_nan));
        const __m256i packed = _mm256_packus_epi32(chosen, chosen);  // each half twice
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at),
                         _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
    }
}

template <Float From, Float To>
JOINWISE_AVX2 void convert_rows_avx2(const Byte* source, Size source_stride, Byte* target, Size target_stride,
                                     Size rows, Size count) {
    const Size whole = count - count % 8;
    for (Size row = 0; row < rows; ++row)
        for (Size i = 0; i < whole; i += 8)
            write_eight<To>(target + row * target_stride + i * width<To>,
                            read_eight<From>(source + row * source_stride + i * width<From>));
    convert_rows<From, To>(source + whole * width<From>, source_stride, target + whole * width<To>, target_stride, rows,
                           count - whole);
}

constexpr Leaves kAvx2 = {
    copy_rows_avx2,
    transpose<std::uint8_t>,
    transpose_avx2<std::uint16_t>,
    transpose_avx2<std::uint32_t>,
    transpose<std::uint64_t>,
    {{},
     {nullptr, nullptr, convert_rows_avx2<kFloat32, kBfloat16>, convert_rows_avx2<kFloat32, kFloat16>},
     {nullptr, convert_rows_avx2<kBfloat16, kFloat32>, nullptr, convert_rows_avx2<kBfloat16, kFloat16>},
     {nullptr, convert_rows_avx2<kFloat16, kFloat32>, convert_rows_avx2<kFloat16, kBfloat16>, nullptr}},
};
#endif

constexpr Leaves kPlain = {
    copy_rows,
    transpose<std::uint8_t>,
    transpose<std::uint16_t>,
    transpose<std::uint32_t>,
    transpose<std::uint64_t>,
    {{},
     {nullptr, nullptr, convert_rows<kFloat32, kBfloat16>, convert_rows<kFloat32, kFloat16>},
     {nullptr, convert_rows<kBfloat16, kFloat32>, nullptr, convert_rows<kBfloat16, kFloat16>},
     {nullptr, convert_rows<kFloat16, kFloat32>, convert_rows<kFloat16, kBfloat16>, nullptr}},
};

}  // namespace

const Leaves& leaves() {
#if defined(__x86_64__) && !defined(JOINWISE_PLAIN)
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (avx2) return kAvx2;
#endif
    return kPlain;
}

}  // namespace joinwise::kv_pack
