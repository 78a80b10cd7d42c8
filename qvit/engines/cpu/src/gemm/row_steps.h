// Rows of any number, done in steps of a number known to the compiler.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qvit::cpu {
namespace {

// A number as a type.
template <int n>
struct Rows {
    static constexpr int value = n;
};

// Calls f(Rows<n>(), row) for consecutive steps of n <= max_rows rows each, as even as can be.
template <int max_rows, class F>
inline void row_steps(int rows, F f) {
    int row = 0;
    for (int steps = (rows + max_rows - 1) / max_rows; steps; --steps) {
        const int step = (rows - row + steps - 1) / steps;
        switch (step) {
#define QVIT_STEP(n)                                    \
    case n:                                             \
        if constexpr (n <= max_rows) f(Rows<n>(), row); \
        break;
            QVIT_STEP(1) QVIT_STEP(2) QVIT_STEP(3) QVIT_STEP(4) QVIT_STEP(5) QVIT_STEP(6)
            QVIT_STEP(7) QVIT_STEP(8) QVIT_STEP(9) QVIT_STEP(10) QVIT_STEP(11) QVIT_STEP(12)
#undef QVIT_STEP
        }
        row += step;
    }
}

}  // namespace
}  // namespace qvit::cpu
