#include "leaves.h"

#include "plain.h"

namespace joinwise::kv_pack {

const Leaves& leaves() {
    using namespace plain;
    static constexpr Leaves kPlain = {
        copy_rows,
        transpose<std::uint8_t>,
        transpose<std::uint16_t>,
        transpose<std::uint32_t>,
        transpose<std::uint64_t>,
        split_pairs,
        join_pairs,
        {{},
         {nullptr, nullptr, convert_rows<kFloat32, kBfloat16>, convert_rows<kFloat32, kFloat16>},
         {nullptr, convert_rows<kBfloat16, kFloat32>, nullptr, convert_rows<kBfloat16, kFloat16>},
         {nullptr, convert_rows<kFloat16, kFloat32>, convert_rows<kFloat16, kBfloat16>, nullptr}},
    };
    static const Leaves* const best = avx2_leaves() ? avx2_leaves() : &kPlain;
    return *best;
}

}  // namespace joinwise::kv_pack
