#include "table.h"

#include "../simd/generic.h"
#include "attention.h"

namespace qvit::cpu {

const OpTable* generic_ops() {
    static const OpTable ops = table<Generic>("generic");
    return &ops;
}

}  // namespace qvit::cpu
