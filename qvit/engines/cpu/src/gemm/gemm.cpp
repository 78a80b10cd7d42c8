// Which kernels this processor runs, and which is fastest for given widths.
#include "gemm.h"

#include <stdexcept>
#include <string>

#include "kernels.h"

#if QVIT_X86
#include <cpuid.h>
#elif QVIT_ARM && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace qvit::cpu {
namespace {

// A kernel, the widths for which it is exact, and whether the processor has its instructions. For one isa, the fastest first.
struct Entry {
    const GemmKernel& kernel;
    int max_weight_bits, max_act_bits;
    bool (*here)();
};

bool always() { return true; }

#if QVIT_X86
bool avx512vnni() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
// Two additions and one multiplication: slower than two multiplications on Intel's processors, whose two 512-bit pipes do both.
bool avx512amd() { return avx512vnni() && !__builtin_cpu_is("intel"); }
bool avx2() {
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);  // which GCC 10's __builtin_cpu_supports does not know
    return __builtin_cpu_supports("avx2") && f16c;
}
// Leaf 7, subleaf 1: GCC 12's __builtin_cpu_supports does not know it.
bool avxvnni() {
    unsigned a = 0, b, c, d;
    return avxvnni_built && avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool avx512vbmi() { return avx512vnni() && __builtin_cpu_supports("avx512vbmi"); }
#elif QVIT_ARM
bool dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Apple processor of 64 bits that runs macOS
#endif
}
#endif

const Entry entries[] = {
#if QVIT_X86
    {avx512table_kernel, 2, 2, avx512vbmi},
    {avx512pairs_kernel, 4, 6, avx512amd},
    {avx512vnni_kernel, 8, 8, avx512vnni},
    {avx2table_kernel, 2, 2, avx2},
    {avxvnni_kernel, 8, 8, avxvnni},
    {avx2_4x4_kernel, 4, 4, avx2},
    {avx2_4x8_kernel, 4, 8, avx2},
    {avx2_8x7_kernel, 8, 7, avx2},
    {avx2_kernel, 8, 8, avx2},
#elif QVIT_ARM
    {neon_kernel, 8, 7, dotprod},
    {neon8_kernel, 8, 8, dotprod},
#endif
    {generic_kernel, 8, 8, always},
};

bool fits(const Entry& entry, int weight_bits, int act_bits) {
    return weight_bits <= entry.max_weight_bits && act_bits <= entry.max_act_bits && entry.here();
}

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx512vnni:
            return "avx512vnni";
        case Isa::avx2:
            return "avx2";
        case Isa::neon:
            return "neon";
        default:
            return "generic";
    }
}

}  // namespace

bool isa_supported(Isa isa) {
    for (const Entry& entry : entries)
        if (entry.kernel.isa == isa && fits(entry, 8, 8)) return true;
    return false;
}

Isa best_isa() {
    for (Isa isa : {Isa::avx512vnni, Isa::neon, Isa::avx2})
        if (isa_supported(isa)) return isa;
    return Isa::generic;
}

const GemmKernel& choose_kernel(int weight_bits, int act_bits, Isa isa) {
    if (weight_bits < 2 || (weight_bits > 4 && weight_bits != 8) || act_bits < 1 || act_bits > 8)
        throw std::invalid_argument("there is no kernel for " + std::to_string(weight_bits) + "-bit weights and " +
                                    std::to_string(act_bits) + "-bit activations");
    for (const Entry& entry : entries)
        if (entry.kernel.isa == isa && fits(entry, weight_bits, act_bits)) return entry.kernel;
    throw std::invalid_argument(std::string("this processor or this build lacks ") + name_of(isa));
}

const GemmKernel* kernel_at(int index, int weight_bits, int act_bits) {
    for (const Entry& entry : entries)
        if (fits(entry, weight_bits, act_bits) && index-- == 0) return &entry.kernel;
    return nullptr;
}

}  // namespace qvit::cpu
