// The loops of `leaves.h` in AVX2. Functions are compiled for it one by one, so that nothing else in the library needs it.
#include "leaves.h"
#include "plain.h"

#if !defined(__x86_64__) || defined(JOINWISE_PLAIN)

const joinwise::kv_pack::Leaves* joinwise::kv_pack::avx2_leaves() { return nullptr; }

#else
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,f16c")))

namespace joinwise::kv_pack {
namespace {

using plain::width;

AVX2 inline __m256i load32(const Byte* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
AVX2 inline __m128i load16(const Byte* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

template <bool Stream>
AVX2 inline void put(Byte* at, __m256i value) {
    if constexpr (Stream)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(at), value);
    else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value);
}

bool can_stream(const Byte* target, Size stride) { return reinterpret_cast<Size>(target) % 32 == 0 && stride % 32 == 0; }

template <bool Stream>
AVX2 void copy_short_rows(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows,
                          Size row_bytes) {
    for (Size row = 0; row < rows; ++row, source += source_stride, target += target_stride)
        for (Size i = 0; i < row_bytes; i += 32) put<Stream>(target + i, load32(source + i));
}

void copy_rows(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows, Size row_bytes,
               bool stream) {
    if (row_bytes % 32 != 0 || row_bytes > 4096 || (source_stride == row_bytes && target_stride == row_bytes))
        plain::copy_rows(source, source_stride, target, target_stride, rows, row_bytes, stream);
    else if (stream && can_stream(target, target_stride))
        copy_short_rows<true>(source, source_stride, target, target_stride, rows, row_bytes);
    else
        copy_short_rows<false>(source, source_stride, target, target_stride, rows, row_bytes);
}

// Rows i and i + `apart`, 16 bytes of each, as one register.
AVX2 inline __m256i load_pair(const Byte* source, Size stride, int i, int apart) {
    const __m256i low = _mm256_castsi128_si256(load16(source + i * stride));
    return _mm256_inserti128_si256(low, load16(source + (i + apart) * stride), 1);
}

// Turns rows of 16 bytes into one cache line for each of their columns. The halves of a line are written together.
template <typename T>
struct Tile;

template <>
struct Tile<std::uint16_t> {
    static constexpr int rows = 32, columns = 8;

    // 16 rows: an 8 x 8 transpose in each half of eight registers.
    AVX2 static inline void half(const Byte* source, Size stride, __m256i* out) {
        __m256i a[8], b[8];
        for (int i = 0; i < 8; ++i) a[i] = load_pair(source, stride, i, 8);
        for (int i = 0; i < 8; i += 2) {
            b[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            a[i] = _mm256_unpacklo_epi32(b[i], b[i + 2]);
            a[i + 1] = _mm256_unpackhi_epi32(b[i], b[i + 2]);
            a[i + 2] = _mm256_unpacklo_epi32(b[i + 1], b[i + 3]);
            a[i + 3] = _mm256_unpackhi_epi32(b[i + 1], b[i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = _mm256_unpacklo_epi64(a[i], a[i + 4]);
            out[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 4]);
        }
    }
};

template <>
struct Tile<std::uint32_t> {
    static constexpr int rows = 16, columns = 4;

    // 8 rows: a 4 x 4 transpose in each half of four registers.
    AVX2 static inline void half(const Byte* source, Size stride, __m256i* out) {
        __m256i a[4];
        for (int i = 0; i < 4; ++i) a[i] = load_pair(source, stride, i, 4);
        const __m256i b0 = _mm256_unpacklo_epi32(a[0], a[1]), b1 = _mm256_unpackhi_epi32(a[0], a[1]);
        const __m256i b2 = _mm256_unpacklo_epi32(a[2], a[3]), b3 = _mm256_unpackhi_epi32(a[2], a[3]);
        out[0] = _mm256_unpacklo_epi64(b0, b2);
        out[1] = _mm256_unpackhi_epi64(b0, b2);
        out[2] = _mm256_unpacklo_epi64(b1, b3);
        out[3] = _mm256_unpackhi_epi64(b1, b3);
    }
};

template <typename T, bool Stream>
AVX2 inline void transpose_tile(const Byte* source, Size source_stride, Byte* target, Size target_stride) {
    constexpr int columns = Tile<T>::columns;
    __m256i left[columns], right[columns];
    Tile<T>::half(source, source_stride, left);
    Tile<T>::half(source + Tile<T>::rows / 2 * source_stride, source_stride, right);
    for (int i = 0; i < columns; ++i) {
        put<Stream>(target + i * target_stride, left[i]);
        put<Stream>(target + i * target_stride + 32, right[i]);
    }
}

// By cache lines of the source, so that each is read once.
template <typename T, bool Stream>
AVX2 void transpose_tiles(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows,
                          Size columns) {
    constexpr Size line = 64 / sizeof(T);
    for (Size first = 0; first < columns; first += line)
        for (Size r = 0; r < rows; r += Tile<T>::rows)
            for (Size c = first; c < columns && c < first + line; c += Tile<T>::columns)
                transpose_tile<T, Stream>(source + r * source_stride + c * sizeof(T), source_stride,
                                          target + c * target_stride + r * sizeof(T), target_stride);
}

template <typename T>
void transpose(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows, Size columns,
               bool stream) {
    const Size tiled_rows = rows - rows % Tile<T>::rows, tiled_columns = columns - columns % Tile<T>::columns;
    if (stream && can_stream(target, target_stride))
        transpose_tiles<T, true>(source, source_stride, target, target_stride, tiled_rows, tiled_columns);
    else
        transpose_tiles<T, false>(source, source_stride, target, target_stride, tiled_rows, tiled_columns);
    plain::transpose_piece<T>(source, source_stride, target, target_stride, tiled_rows, rows, 0, columns);
    plain::transpose_piece<T>(source, source_stride, target, target_stride, 0, tiled_rows, tiled_columns, columns);
}

template <bool Stream>
AVX2 void split_lines(const Byte* source, Byte* target, Size row_stride, Size pairs, Size columns) {
    const __m256i lower = _mm256_set1_epi32(0xffff);
    for (Size p = 0; p < pairs; ++p, target += 2 * row_stride)
        for (Size at = 0; at < 2 * columns; at += 32, source += 64) {
            const __m256i a = load32(source), b = load32(source + 32);
            const __m256i even = _mm256_packus_epi32(_mm256_and_si256(a, lower), _mm256_and_si256(b, lower));
            const __m256i odd = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
            put<Stream>(target + at, _mm256_permute4x64_epi64(even, 0xd8));
            put<Stream>(target + row_stride + at, _mm256_permute4x64_epi64(odd, 0xd8));
        }
}

void split_pairs(const Byte* source, Byte* target, Size row_stride, Size pairs, Size columns, bool stream) {
    if (columns % 16 != 0)
        plain::split_pairs(source, target, row_stride, pairs, columns, stream);
    else if (stream && columns % 32 == 0 && can_stream(target, row_stride))  // by whole cache lines
        split_lines<true>(source, target, row_stride, pairs, columns);
    else
        split_lines<false>(source, target, row_stride, pairs, columns);
}

template <bool Stream>
AVX2 void join_lines(const Byte* source, Byte* target, Size row_stride, Size pairs, Size columns) {
    for (Size p = 0; p < pairs; ++p, source += 2 * row_stride)
        for (Size at = 0; at < 2 * columns; at += 32, target += 64) {
            const __m256i even = load32(source + at), odd = load32(source + row_stride + at);
            const __m256i a = _mm256_unpacklo_epi16(even, odd), b = _mm256_unpackhi_epi16(even, odd);
            put<Stream>(target, _mm256_permute2x128_si256(a, b, 0x20));
            put<Stream>(target + 32, _mm256_permute2x128_si256(a, b, 0x31));
        }
}

void join_pairs(const Byte* source, Byte* target, Size row_stride, Size pairs, Size columns, bool stream) {
    if (columns % 16 != 0)
        plain::join_pairs(source, target, row_stride, pairs, columns, stream);
    else if (stream && can_stream(target, 64))
        join_lines<true>(source, target, row_stride, pairs, columns);
    else
        join_lines<false>(source, target, row_stride, pairs, columns);
}

template <Float F>
AVX2 inline __m256 read_eight(const Byte* at) {
    if constexpr (F == kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    if constexpr (F == kFloat16) return _mm256_cvtph_ps(load16(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(at)), 16));
}

// Bfloat16 in the lower half of each place.
AVX2 inline __m256i narrow_bfloat16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, is_nan);
}

template <Float F>
AVX2 inline void write_sixteen(Byte* at, __m256 low, __m256 high) {
    if constexpr (F == kFloat32) {
        put<false>(at, _mm256_castps_si256(low));
        put<false>(at + 32, _mm256_castps_si256(high));
    } else if constexpr (F == kFloat16) {
        const __m256i first = _mm256_castsi128_si256(_mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
        put<false>(at, _mm256_inserti128_si256(first, _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), 1));
    } else {
        const __m256i mixed = _mm256_packus_epi32(narrow_bfloat16(low), narrow_bfloat16(high));
        put<false>(at, _mm256_permute4x64_epi64(mixed, 0xd8));
    }
}

template <Float From, Float To>
AVX2 void convert_rows(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows,
                       Size count) {
    const Size whole = count - count % 16;
    for (Size row = 0; row < rows; ++row) {
        const Byte* from = source + row * source_stride;
        Byte* to = target + row * target_stride;
        for (Size i = 0; i < whole; i += 16)
            write_sixteen<To>(to + i * width<To>, read_eight<From>(from + i * width<From>),
                              read_eight<From>(from + (i + 8) * width<From>));
    }
    plain::convert_rows<From, To>(source + whole * width<From>, source_stride, target + whole * width<To>,
                                  target_stride, rows, count - whole);
}

}  // namespace

const Leaves* avx2_leaves() {
    static constexpr Leaves kAvx2 = {
        copy_rows,
        plain::transpose<std::uint8_t>,
        transpose<std::uint16_t>,
        transpose<std::uint32_t>,
        plain::transpose<std::uint64_t>,
        split_pairs,
        join_pairs,
        {{},
         {nullptr, nullptr, convert_rows<kFloat32, kBfloat16>, convert_rows<kFloat32, kFloat16>},
         {nullptr, convert_rows<kBfloat16, kFloat32>, nullptr, convert_rows<kBfloat16, kFloat16>},
         {nullptr, convert_rows<kFloat16, kFloat32>, convert_rows<kFloat16, kBfloat16>, nullptr}},
    };
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") ? &kAvx2 : nullptr;
}

}  // namespace joinwise::kv_pack
#endif
