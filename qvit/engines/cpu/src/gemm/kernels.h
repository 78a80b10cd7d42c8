// The kernels of the build, for gemm.cpp alone: each file of instructions defines its own. QVIT_X86 and QVIT_ARM say which
// exist.
#pragma once

#include "gemm.h"

#if defined(__x86_64__)
#define QVIT_X86 1
#elif defined(__aarch64__)
#define QVIT_ARM 1
#endif

namespace qvit::cpu {

extern const GemmKernel generic_kernel;
#if QVIT_X86
extern const GemmKernel avx512vnni_kernel, avx512pairs_kernel, avx512table_kernel;
extern const GemmKernel avx2_kernel, avx2_4x4_kernel, avx2_4x8_kernel, avx2_8x7_kernel, avx2table_kernel, avxvnni_kernel;
extern const bool avxvnni_built;
#elif QVIT_ARM
extern const GemmKernel neon_kernel, neon8_kernel;
#endif

}  // namespace qvit::cpu
