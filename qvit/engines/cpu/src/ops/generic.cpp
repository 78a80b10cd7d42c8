#include "table.h"

#include "../simd/generic.h"
#include "attention.h"

namespace qvit::cpu {

const OpTable* generic_ops() {
    static constexpr auto make = [] { return table<Generic>("generic"); };
    static const OpTable ops = make();
    return &ops;
}

}  // namespace qvit::cpu
