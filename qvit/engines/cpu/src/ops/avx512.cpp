#include "table.h"

#include "../simd/avx512.h"
#include "attention.h"

namespace qvit::cpu {

const OpTable* avx512_ops() {
    static const OpTable ops = table<Avx512>("avx512vnni");
    return &ops;
}

}  // namespace qvit::cpu
