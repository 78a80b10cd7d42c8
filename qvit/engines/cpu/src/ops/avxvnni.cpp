// simd/avx2.h once more, compiled for processors that have AVX-VNNI's byte products.
#include "table.h"

#include "../simd/avx2.h"
#include "attention.h"

namespace qvit::cpu {

const OpTable* avxvnni_ops() {
    static const OpTable ops = table<Avx2>("avxvnni");
    return &ops;
}

}  // namespace qvit::cpu
