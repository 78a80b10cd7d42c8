#include "table.h"

#include "../simd/avx2.h"
#include "attention.h"

namespace qvit::cpu {

const OpTable* avx2_ops() {
    static constexpr auto make = [] { return table<Avx2>("avx2"); };
    static const OpTable ops = make();
    return &ops;
}

}  // namespace qvit::cpu
