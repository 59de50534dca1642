// A row from float to 8 bits, with what comes before the rounding. For the file of each kind of lanes.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace fly {
namespace {

// Types, not functions: a pointer to one would be called for every 16 values.
struct Silu {
    [[gnu::always_inline]] Lanes operator()(Lanes x) const {
        return x / (Lanes::all(1.0F) + exponential(Lanes::zero() - x));
    }
};

// x / (1 + exp(-2 y)) is x (1 + tanh y) / 2.
struct GeluTanh {
    [[gnu::always_inline]] Lanes operator()(Lanes x) const {
        const Lanes y = Lanes::all(0.7978845608028654F) * fma(Lanes::all(0.044715F) * x * x, x, x);
        return x / (Lanes::all(1.0F) + exponential(Lanes::all(-2.0F) * y));
    }
};

// step(i, n) for 16 values at a time, and for the last ones, of which there are n.
template <typename Step>
[[gnu::always_inline]] inline void each_lanes(size_t count, Step step) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16) step(i, size_t{16});
    if (i < count) step(i, count - i);
}

// Of a row's values the largest magnitude's bits: as whole numbers those of infinity and NaN are above all others.
struct LargestBits {
    Integers most = Integers::zero();

    [[gnu::always_inline]] void add(Lanes values) { most = max(most, Integers::bits(magnitude(values))); }
};

// result [depth] = value(i, n); returns the largest magnitude's bits.
template <typename Value>
[[gnu::always_inline]] inline LargestBits fill(size_t depth, float* result, Value value) {
    LargestBits bits;
    each_lanes(depth, [&](size_t i, size_t n) __attribute__((always_inline)) {
        const Lanes values = value(i, n);
        values.store(result + i, n);
        bits.add(values);
    });
    return bits;
}

template <typename Activation>
LargestBits gate(const RowInput& input, float* result) {
    const Activation activation;
    const float *gates = input.x, *values = input.x + input.depth;
    return fill(input.depth, result, [&](size_t i, size_t n) __attribute__((always_inline)) {
        return activation(Lanes::load(gates + i, n)) * Lanes::load(values + i, n);
    });
}

// Four sums, since each addition waits for the one before.
inline float mean_square(const float* x, size_t depth) {
    Lanes squares[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
    size_t i = 0;
    for (; i + 64 <= depth; i += 64)
        for (size_t j = 0; j < 4; ++j) {
            const Lanes values = Lanes::load(x + i + 16 * j);
            squares[j] = fma(values, values, squares[j]);
        }
    each_lanes(depth - i, [&](size_t at, size_t n) __attribute__((always_inline)) {
        const Lanes values = Lanes::load(x + i + at, n);
        squares[0] = fma(values, values, squares[0]);
    });
    return sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(depth);
}

inline LargestBits normalize(const RowInput& input, float* result) {
    const Lanes factor = Lanes::all(1.0F / std::sqrt(mean_square(input.x, input.depth) + input.epsilon));
    return fill(input.depth, result, [&](size_t i, size_t n) __attribute__((always_inline)) {
        return Lanes::load(input.x + i, n) * factor * Lanes::load(input.weight + i, n);
    });
}

inline LargestBits largest_bits(const float* x, size_t depth) {
    LargestBits bits;
    each_lanes(depth, [&](size_t i, size_t n) __attribute__((always_inline)) { bits.add(Lanes::load(x + i, n)); });
    return bits;
}

// Dividing by one number for a whole row: the rounded quotient is corrected by what it leaves, which gives the bits of
// a division in a third of the time.
struct Divisor {
    Lanes divisor, reciprocal;

    explicit Divisor(float number) : divisor(Lanes::all(number)), reciprocal(Lanes::all(1.0F / number)) {}
    [[gnu::always_inline]] Lanes quotient(Lanes x) const {
        const Lanes about = x * reciprocal;
        return fma(fma(Lanes::zero() - about, divisor, x), reciprocal, about);
    }
};

// Where 16 values of a row go that lie side by side: in chunks of 4, or whole.
template <size_t Chunk>
[[gnu::always_inline]] inline void place(__m128i bytes, size_t first, size_t step, int8_t* values) {
    if constexpr (Chunk == 4) {
        int8_t* at = values + first / 4 * step;
        const auto put = [](int8_t* p, int four) __attribute__((always_inline)) { std::memcpy(p, &four, 4); };
        put(at, _mm_cvtsi128_si32(bytes));
        put(at + step, _mm_extract_epi32(bytes, 1));
        put(at + 2 * step, _mm_extract_epi32(bytes, 2));
        put(at + 3 * step, _mm_extract_epi32(bytes, 3));
    } else {
        static_assert(Chunk % 16 == 0);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + first / Chunk * step + first % Chunk), bytes);
    }
}

// Rounds x / scale [depth], and returns the sum of what comes out. `values` is the row's beginning in a layout of
// chunks that are `step` apart.
template <size_t Chunk>
int32_t round_row(const float* x, float scale, size_t depth, size_t padded_depth, size_t step, int8_t* values) {
    const Divisor divisor(scale);
    Integers total = Integers::zero();
    each_lanes(depth, [&](size_t i, size_t n) __attribute__((always_inline)) {
        const Integers rounded = Integers::rounded(divisor.quotient(Lanes::load(x + i, n)));
        total = total + rounded;
        place<Chunk>(rounded.bytes(), i, step, values);
    });
    for (size_t i = (depth + 15) / 16 * 16; i < padded_depth; i += 16)
        place<Chunk>(_mm_setzero_si128(), i, step, values);
    return sum(total);
}

float quantize_row(const RowInput& input, float* scratch, RowLayout layout, int8_t* values, int32_t* row_sum) {
    const float* x = input.prologue == Prologue::kNone ? input.x : scratch;
    LargestBits bits;
    switch (input.prologue) {
        case Prologue::kNone:
            bits = largest_bits(x, input.depth);
            break;
        case Prologue::kRmsNorm:
            bits = normalize(input, scratch);
            break;
        case Prologue::kSilu:
            bits = gate<Silu>(input, scratch);
            break;
        case Prologue::kGeluTanh:
            bits = gate<GeluTanh>(input, scratch);
            break;
    }
    const int32_t most_bits = largest(bits.most);
    const bool is_finite = most_bits < 0x7F800000;
    float most;
    std::memcpy(&most, &most_bits, sizeof(most));
    const float scale = (most > kSmallestRowMaximum ? most : kSmallestRowMaximum) / kActivationLimit;
    const auto round = layout.chunk == 4 ? round_row<4> : round_row<kDepthStep>;
    *row_sum = round(x, scale, is_finite ? input.depth : 0, input.padded_depth, layout.group * layout.chunk, values);
    return is_finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace
}  // namespace fly
