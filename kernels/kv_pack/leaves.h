// The innermost loops of kv_pack, in the best form that this processor has. Strides are in bytes; pointers may be
// unaligned.
#pragma once
#include <cstdint>

namespace joinwise::kv_pack {

using Byte = std::uint8_t;
using Size = std::int64_t;

// Element types that are converted into one another; any other type only travels as it is.
enum Float : int { kOpaque = 0, kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3, kFloats = 4 };

// `stream` asks to write around the caches: right for more bytes than they hold. The caller fences.
// Copies rows of `row_bytes`.
using CopyRows = void (*)(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows,
                          Size row_bytes, bool stream);
// target[c][r] = source[r][c]
using Transpose = void (*)(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows,
                           Size columns, bool stream);
// Rows of 2-byte elements, interleaved two by two: element c of rows 2p and 2p + 1 lies at (p * columns + c) * 2 and beside
// it. `split` reads pairs into rows, `join` writes rows as pairs.
using Pairs = void (*)(const Byte* source, Byte* target, Size row_stride, Size pairs, Size columns, bool stream);
// Converts rows of `count` numbers, rounding to nearest even; NaN stays NaN.
using ConvertRows = void (*)(const Byte* source, Size source_stride, Byte* target, Size target_stride, Size rows,
                             Size count);

struct Leaves {
    CopyRows copy_rows;
    Transpose transpose1, transpose2, transpose4, transpose8;  // by the bytes of an element
    Pairs split_pairs, join_pairs;
    ConvertRows convert[kFloats][kFloats];                     // [from][to]; null where nothing is to be converted

    Transpose transpose(Size element) const {
        return element == 1 ? transpose1 : element == 2 ? transpose2 : element == 4 ? transpose4 : transpose8;
    }
};

// The best that this processor has.
const Leaves& leaves();

// Null on a processor without AVX2.
const Leaves* avx2_leaves();

}  // namespace joinwise::kv_pack
