// The table kernel of 2-bit weights and activations for AVX2.
#include "avx2.h"
#include "kernels.h"
#include "pair_table.h"

namespace qvit::cpu {

const GemmKernel avx2table_kernel = PairTable<Bytes256>::kernel<4>("table", Isa::avx2);

}  // namespace qvit::cpu
