#include "table.h"

#include "../simd/neon.h"
#include "attention.h"

namespace qvit::cpu {

const OpTable* neon_ops() {
    static constexpr auto make = [] { return table<Neon>("neon"); };
    static const OpTable ops = make();
    return &ops;
}

}  // namespace qvit::cpu
