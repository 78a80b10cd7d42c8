// Integer GEMM kernels of the CPU engine: exactness on odd shapes, and speed as a share of the instruction ceiling.
//
//     S=qvit/engines/cpu/src/gemm; V="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
//     for f in gemm packed_codes gemm_generic; do g++ -std=c++17 -O3 -c $S/$f.cpp; done
//     for f in avx2 avx2table avxvnni; do g++ -std=c++17 -O3 -mavx2 -mavxvnni -c $S/gemm_$f.cpp; done
//     for f in vnni pairs table; do g++ -std=c++17 -O3 $V -mavx512vbmi -c $S/gemm_avx512$f.cpp; done
//     g++ -std=c++17 -O3 -I$S benchmarks/cpu_gemm.cpp *.o -o cpu_gemm
//     ./cpu_gemm --check && taskset -c 1 ./cpu_gemm [rounds [W4A4]]
//
// On aarch64: gemm, packed_codes, gemm_generic, and gemm_neon with -march=armv8.2-a+dotprod.
// One thread, its processor time. GMAC/s and, in brackets, the share of the rate of vpdpbusd on registers: medians of rounds in
// which the ceiling and the kernels take turns. Unpacking weights and preparing activations are inside the time. Shown are all
// kernels of the best set of instructions, and the one chosen of each other.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <string>
#include <vector>

#include "gemm.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace qvit::cpu;

namespace {

std::mt19937 random_bits(7);

struct Problem {
    int rows, K, M, weight_bits, act_bits;
    std::vector<uint8_t> a;  // [rows][K]
    std::vector<int8_t> w;   // [M][K]

    // extremes: every code the largest or smallest, so that anything that can overflow does.
    Problem(int rows, int K, int M, int weight_bits, int act_bits, bool extremes = false)
        : rows(rows), K(K), M(M), weight_bits(weight_bits), act_bits(act_bits), a(size_t(rows) * K), w(size_t(M) * K) {
        const unsigned levels = 1u << act_bits, half = 1u << (weight_bits - 1);
        for (size_t i = 0; i < a.size(); ++i) a[i] = uint8_t(extremes ? levels - 1 : random_bits() % levels);
        for (int channel = 0; channel < M; ++channel)
            for (int k = 0; k < K; ++k) {
                int code = extremes ? (channel % 2 ? int(half) - 1 : -int(half)) : int(random_bits() % (2 * half)) - int(half);
                w[size_t(channel) * K + k] = int8_t(code);
            }
    }

    int32_t sum(int row, int channel) const {
        int32_t total = 0;
        for (int k = 0; k < K; ++k) total += int32_t(a[size_t(row) * K + k]) * w[size_t(channel) * K + k];
        return total;
    }
};

// A problem in a kernel's own form, and the loop in which the engine runs it.
struct Run {
    const Problem& problem;
    const GemmKernel& kernel;
    PackedWeight weight;
    ptrdiff_t pitch;
    AlignedBytes prepared, scratch;
    std::vector<int32_t> out;  // [panel][tile of rows][kernel.panel], the last tile only unless kept

    Run(const Problem& p, const GemmKernel& k)
        : problem(p),
          kernel(k),
          weight(k.pack(p.w.data(), p.M, p.K, p.weight_bits)),
          pitch(ptrdiff_t(k.row_bytes(p.K))),
          prepared(aligned_bytes(size_t(pitch) * p.rows)),
          scratch(aligned_bytes(k.scratch_bytes(p.K))) {}

    void prepare() {
        if (kernel.prepare) {
            kernel.prepare(problem.a.data(), problem.K, problem.rows, problem.K, prepared.get(), pitch);
        } else {
            for (int row = 0; row < problem.rows; ++row)
                std::memcpy(prepared.get() + row * pitch, problem.a.data() + size_t(row) * problem.K, size_t(problem.K));
        }
    }

    template <class Epilogue>
    void panels(int tile, int32_t* out_tile, Epilogue epilogue) {
        for (int p = 0; p < weight.panels(); ++p) {
            const uint8_t* panel = kernel.unpack(weight, p, scratch.get());
            for (int row = 0; row < problem.rows; row += tile) {
                int count = std::min(tile, problem.rows - row);
                kernel.sums(prepared.get() + row * pitch, pitch, count, panel, problem.K, out_tile, kernel.panel);
                epilogue(p, row, count);
            }
        }
    }
};

// `fault` is added to every sum, to see that the check notices.
bool check_one(const Problem& problem, const GemmKernel& kernel, int fault) {
    Run run(problem, kernel);
    run.prepare();
    for (int tile : {problem.rows, 5}) {
        std::vector<int32_t> out(size_t(tile) * kernel.panel);
        long wrong = 0;
        run.panels(tile, out.data(), [&](int p, int row, int count) {
            for (int r = 0; r < count; ++r)
                for (int c = 0; c < kernel.panel && p * kernel.panel + c < problem.M; ++c)
                    wrong += out[size_t(r) * kernel.panel + c] + fault != problem.sum(row + r, p * kernel.panel + c);
        });
        if (wrong) {
            std::printf("WRONG: %s, W%dA%d, rows %d, K %d, M %d: %ld sums\n", kernel.name, problem.weight_bits,
                        problem.act_bits, problem.rows, problem.K, problem.M, wrong);
            return false;
        }
    }
    return true;
}

int check(int fault) {
    const int shapes[][3] = {{1, 1, 1},    {3, 2, 5},     {7, 3, 17},    {5, 31, 33},   {9, 64, 64},    {13, 65, 100},
                             {6, 127, 48}, {4, 192, 192}, {11, 588, 65}, {23, 130, 10}, {2, 1536, 130}, {5, 8191, 3}};
    int bad = 0;
    long checks = 0;
    for (int weight_bits : {2, 3, 4, 8})
        for (int act_bits = 1; act_bits <= 8; ++act_bits)
            for (auto& shape : shapes)
                for (bool extremes : {false, true}) {
                    Problem problem(shape[0], shape[1], shape[2], weight_bits, act_bits, extremes);
                    for (int i = 0; const GemmKernel* kernel = kernel_at(i, weight_bits, act_bits); ++i, ++checks)
                        bad += !check_one(problem, *kernel, fault);
                }
    std::printf("%ld checks, %d wrong\n", checks, bad);
    return bad != 0;
}

// The processor time of this thread: what other programs take is not in it.
double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

#if defined(__x86_64__)
// vpdpbusd on registers, 512 bit: MACs done.
__attribute__((target("avx512f,avx512vnni"))) double dot_burst() {
    __m512i a = _mm512_set1_epi32(1), b = _mm512_set1_epi32(2), c0 = a, c1 = a, c2 = a, c3 = a, c4 = a, c5 = a, c6 = a, c7 = a;
    for (int i = 0; i < 15000; ++i)
        asm volatile(
            "vpdpbusd %8,%9,%0\n\tvpdpbusd %8,%9,%1\n\tvpdpbusd %8,%9,%2\n\tvpdpbusd %8,%9,%3\n\t"
            "vpdpbusd %8,%9,%4\n\tvpdpbusd %8,%9,%5\n\tvpdpbusd %8,%9,%6\n\tvpdpbusd %8,%9,%7"
            : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7)
            : "v"(a), "v"(b));
    return 15000. * 8 * 64;
}
#endif

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

void speed(int rounds, const char* only) {
    const int widths[][2] = {{8, 8}, {4, 4}, {3, 3}, {2, 2}, {2, 4}, {4, 8}};
    const int shapes[][3] = {{197, 384, 1152}, {197, 384, 384}, {197, 384, 1536}, {197, 1536, 384}, {100, 384, 1536},
                             {257, 384, 1536}, {197, 192, 576}, {197, 192, 768},  {197, 768, 3072}, {1576, 384, 1536}};
    constexpr int tile = 16;
    alignas(64) static int32_t out[tile * 256];
    for (auto& width : widths) {
        const std::string name = "W" + std::to_string(width[0]) + "A" + std::to_string(width[1]);
        if (only && name != only) continue;
        for (auto& shape : shapes) {
            Problem problem(shape[0], shape[1], shape[2], width[0], width[1]);
            std::vector<Run> runs;
            for (int i = 0; const GemmKernel* kernel = kernel_at(i, width[0], width[1]); ++i)
                if (kernel->isa == best_isa() ||
                    (kernel->isa != Isa::generic && kernel == &choose_kernel(width[0], width[1], kernel->isa)))
                    runs.emplace_back(problem, *kernel);
            const double macs = double(shape[0]) * shape[1] * shape[2];
            std::vector<std::vector<double>> rates(runs.size()), shares(runs.size());
            std::vector<double> ceilings;
            for (int round = 0; round < rounds; ++round) {
                double ceiling = 0;
#if defined(__x86_64__)
                if (isa_supported(Isa::avx512vnni)) {
                    double start = now(), done = dot_burst();
                    ceiling = done / (now() - start) * 1e-9;
                    ceilings.push_back(ceiling);
                }
#endif
                for (size_t i = 0; i < runs.size(); ++i) {
                    double start = now();
                    if (runs[i].kernel.prepare || round == 0) runs[i].prepare();
                    runs[i].panels(tile, out, [](int, int, int) {});
                    double rate = macs / (now() - start) * 1e-9;
                    rates[i].push_back(rate);
                    if (ceiling > 0) shares[i].push_back(rate / ceiling);
                }
            }
            std::printf("%s rows %4d K %4d M %4d:", name.c_str(), shape[0], shape[1], shape[2]);
            if (!ceilings.empty()) std::printf(" ceiling %.0f |", median(ceilings));
            for (size_t i = 0; i < runs.size(); ++i) {
                std::printf(" %s %.0f", runs[i].kernel.name, median(rates[i]));
                if (!shares[i].empty()) std::printf(" (%.2f)", median(shares[i]));
            }
            std::printf("\n");
            std::fflush(stdout);
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && !std::strcmp(argv[1], "--check")) return check(argc > 2);
    speed(argc > 1 ? std::atoi(argv[1]) : 41, argc > 2 ? argv[2] : nullptr);
    return 0;
}
