#include "table.h"

#include "../simd/neon.h"
#include "attention.h"

namespace qvit::cpu {

const OpTable* neon_ops() {
    static const OpTable ops = table<Neon>("neon");
    return &ops;
}

}  // namespace qvit::cpu
