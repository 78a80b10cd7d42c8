#include "table.h"

#include "../simd/avx512.h"
#include "attention.h"

namespace qvit::cpu {

const OpTable* avx512_ops() {
    static constexpr auto make = [] { return table<Avx512>("avx512vnni"); };
    static const OpTable ops = make();
    return &ops;
}

}  // namespace qvit::cpu
