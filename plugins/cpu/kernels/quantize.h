// A row from float to 8 bits, with what comes before the rounding. For the file of each kind of lanes.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace fly {
namespace {

inline Lanes silu(Lanes x) { return x / (Lanes::all(1.0F) + exponential(Lanes::zero() - x)); }

// x / (1 + exp(-2 y)) is x (1 + tanh y) / 2.
inline Lanes gelu_tanh(Lanes x) {
    const Lanes y = Lanes::all(0.7978845608028654F) * fma(Lanes::all(0.044715F) * x * x, x, x);
    return x / (Lanes::all(1.0F) + exponential(Lanes::all(-2.0F) * y));
}

template <typename Activation>
void gate(const RowInput& input, float* result, Activation activation) {
    const float* values = input.x + input.depth;
    for (size_t i = 0; i < input.depth; i += 16) {
        const size_t n = input.depth - i;
        (activation(Lanes::load(input.x + i, n)) * Lanes::load(values + i, n)).store(result + i, n);
    }
}

inline void normalize(const RowInput& input, float* result) {
    Lanes squares = Lanes::zero();
    for (size_t i = 0; i < input.depth; i += 16) {
        const Lanes x = Lanes::load(input.x + i, input.depth - i);
        squares = fma(x, x, squares);
    }
    const float mean = sum(squares) / static_cast<float>(input.depth);
    const Lanes factor = Lanes::all(1.0F / std::sqrt(mean + input.epsilon));
    for (size_t i = 0; i < input.depth; i += 16) {
        const size_t n = input.depth - i;
        (Lanes::load(input.x + i, n) * factor * Lanes::load(input.weight + i, n)).store(result + i, n);
    }
}

inline const float* prepared(const RowInput& input, float* scratch) {
    switch (input.prologue) {
        case Prologue::kNone:
            return input.x;
        case Prologue::kRmsNorm:
            normalize(input, scratch);
            return scratch;
        case Prologue::kSilu:
            gate(input, scratch, silu);
            return scratch;
        case Prologue::kGeluTanh:
            gate(input, scratch, gelu_tanh);
            return scratch;
    }
    return input.x;
}

// Which numbers a row's own may be depends on the largest alone, so that no row depends on another.
float quantize_row(const RowInput& input, float* scratch, RowLayout layout, int8_t* values, int32_t* row_sum) {
    const float* x = prepared(input, scratch);
    Lanes most = Lanes::zero();
    bool is_finite = true;
    for (size_t i = 0; i < input.depth; i += 16) {
        const Lanes part = Lanes::load(x + i, input.depth - i);
        is_finite &= !any_not_finite(part);
        most = max(most, magnitude(part));
    }
    const float scale = std::fmax(largest(most), kSmallestRowMaximum) / kActivationLimit;
    const Lanes divisor = Lanes::all(scale);
    const size_t step = layout.group * layout.chunk;
    int32_t total = 0;
    for (size_t i = 0; i < input.padded_depth; i += 16) {
        alignas(16) int8_t part[16] = {};
        if (is_finite && i < input.depth) (Lanes::load(x + i, input.depth - i) / divisor).store_int8(part);
        for (size_t j = 0; j < 16; ++j) total += part[j];
        for (size_t j = 0; j < 16; j += 4) {
            const size_t k = i + j;
            std::memcpy(values + k / layout.chunk * step + k % layout.chunk, part + j, 4);
        }
    }
    *row_sum = total;
    return is_finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace
}  // namespace fly
