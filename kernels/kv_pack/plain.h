// The loops of `leaves.h` for every processor, and the edges of the vector forms.
#pragma once
#include <algorithm>
#include <cstring>

#include "leaves.h"

namespace joinwise::kv_pack::plain {

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

template <typename To, typename From>
To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

inline float widen_bfloat16(std::uint16_t bits) { return bits_as<float>(static_cast<std::uint32_t>(bits) << 16); }

inline std::uint16_t narrow_bfloat16(float value) {
    const auto bits = bits_as<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);  // a quiet NaN
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float widen_float16(std::uint16_t bits) {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    const std::uint32_t exponent = bits >> 10 & 0x1fu, fraction = bits & 0x3ffu;
    std::uint32_t wide;
    if (exponent == 31)
        wide = 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u);
    else if (exponent != 0)
        wide = (exponent + 112) << 23 | fraction << 13;
    else  // zero or subnormal: fraction * 2^-24, exact
        wide = bits_as<std::uint32_t>(static_cast<float>(fraction) * 0x1p-24f);
    return bits_as<float>(wide | sign);
}

inline std::uint16_t narrow_float16(float value) {
    const auto signed_bits = bits_as<std::uint32_t>(value);
    const std::uint32_t sign = signed_bits >> 16 & 0x8000u, bits = signed_bits & 0x7fffffffu;
    std::uint32_t half = 0;
    if (bits > 0x7f800000u) {
        half = 0x7e00u | (bits >> 13 & 0x3ffu);  // a quiet NaN
    } else if (bits >= 0x477ff000u) {            // rounds to 65536 or more
        half = 0x7c00u;
    } else if (bits >= 0x38800000u) {
        half = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
    } else if (bits > 0x33000000u) {  // subnormal: shift the fraction with its leading one
        const std::uint32_t shift = 126 - (bits >> 23), fraction = (bits & 0x7fffffu) | 0x800000u;
        const std::uint32_t kept = fraction >> shift, rest = fraction & ((1u << shift) - 1), middle = 1u << (shift - 1);
        half = kept + (rest > middle || (rest == middle && (kept & 1u)));
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

inline void copy_rows(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows,
                      Size row_bytes, bool) {
    if (source_stride == row_bytes && target_stride == row_bytes) {
        std::memcpy(target, source, rows * row_bytes);
        return;
    }
    for (Size row = 0; row < rows; ++row)
        std::memcpy(target + row * target_stride, source + row * source_stride, row_bytes);
}

// Rows [first_row, rows) of columns [first_column, columns).
template <typename T>
void transpose_piece(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size first_row,
                     Size rows, Size first_column, Size columns) {
    for (Size r = first_row; r < rows; ++r)
        for (Size c = first_column; c < columns; ++c)
            store(target + c * target_stride + r * sizeof(T), load<T>(source + r * source_stride + c * sizeof(T)));
}

template <typename T>
void transpose(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows, Size columns,
               bool) {
    constexpr Size tile = 16;
    for (Size c = 0; c < columns; c += tile)
        for (Size r = 0; r < rows; r += tile)
            transpose_piece<T>(source, source_stride, target, target_stride, r, std::min(rows, r + tile), c,
                               std::min(columns, c + tile));
}

inline void split_pairs(const Byte* source, Byte* target, Size row_stride, Size pairs, Size columns, bool) {
    for (Size p = 0; p < pairs; ++p, source += 4 * columns, target += 2 * row_stride)
        for (Size c = 0; c < columns; ++c) {
            store(target + 2 * c, load<std::uint16_t>(source + 4 * c));
            store(target + row_stride + 2 * c, load<std::uint16_t>(source + 4 * c + 2));
        }
}

inline void join_pairs(const Byte* source, Byte* target, Size row_stride, Size pairs, Size columns, bool) {
    for (Size p = 0; p < pairs; ++p, source += 2 * row_stride, target += 4 * columns)
        for (Size c = 0; c < columns; ++c) {
            store(target + 4 * c, load<std::uint16_t>(source + 2 * c));
            store(target + 4 * c + 2, load<std::uint16_t>(source + row_stride + 2 * c));
        }
}

template <Float From, Float To>
void convert_rows(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows, Size count) {
    for (Size row = 0; row < rows; ++row)
        for (Size i = 0; i < count; ++i)
            write_number<To>(target + row * target_stride + i * width<To>,
                             read_number<From>(source + row * source_stride + i * width<From>));
}

}  // namespace joinwise::kv_pack::plain
