#include "table.h"

#include "../simd/avx2.h"
#include "attention.h"

namespace qvit::cpu {

const OpTable* avx2_ops() {
    static const OpTable ops = table<Avx2>("avx2");
    return &ops;
}

}  // namespace qvit::cpu
