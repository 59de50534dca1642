// The loops that touch every number, once for each kind of vector unit. All kinds give the same bits: integers are
// added exactly, and floats in the order that 16 lanes have everywhere (lanes_*.h).
//
// The file of a kind is compiled with that kind's instructions. What it includes has internal linkage or is always
// inlined: of an inline function that two files have the linker keeps one, and it may be the one that this machine
// cannot run.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace fly {

// What is done to a row before it is rounded to 8 bits.
enum class Prologue : int64_t { kNone = 0, kRmsNorm = 1, kSilu = 2, kGeluTanh = 3 };

// One row of a linear layer's input. `depth` values come out, padded with zeros to `padded_depth`.
struct RowInput {
    const float* x;       // [depth], or [2 * depth] of gates and values for an activation
    const float* weight;  // [depth] of the RMS norm, or null
    Prologue prologue;
    float epsilon;
    size_t depth;
    size_t padded_depth;
};

// Where the values of rows lie, so that what a step of the product reads lies together:
// [groups of rows][padded_depth / chunk][rows of the group][chunk]. The last group has room for all of its rows.
struct RowLayout {
    size_t group;
    size_t chunk;  // bytes; divides kDepthStep

    [[gnu::always_inline]] size_t start(size_t row, size_t padded_depth) const {
        return row / group * group * padded_depth + row % group * chunk;
    }
    [[gnu::always_inline]] size_t groups(size_t count) const { return (count + group - 1) / group; }
    [[gnu::always_inline]] size_t size(size_t count, size_t padded_depth) const {
        return groups(count) * group * padded_depth;
    }
};

// Rows of 8 bits for a product. `sums` are of the rows' values.
struct Rows {
    const int8_t* values;
    const int32_t* sums;
    const float* scales;
    size_t count;
    size_t padded_depth;
    RowLayout layout;
};

// A weight of -64..64, as uint8 with kWeightOffset added, [blocks][padded_depth / 4][16 outputs][4 inputs].
struct PackedWeight {
    const uint8_t* values;
    const float* scales;    // [outputs]
    const float* bias;      // [outputs] or null
    const float* residual;  // [count, outputs], added to the result, or null
    size_t outputs;
};

constexpr int32_t kWeightOffset = 64;
constexpr size_t kBlock = 16;      // outputs of a block of a packed weight
constexpr size_t kDepthStep = 64;  // depth is padded to a multiple
constexpr float kActivationLimit = 127.0F;
constexpr float kSmallestRowMaximum = 1e-12F;

// What a row of logits says of itself. The log probability of a logit x is x - largest - log_sum.
struct RowEntropies {
    float entropy;       // nats, of the whole vocabulary
    float entropy_topk;  // of the most probable tokens, not renormalised
    double largest;
    double log_sum;
};

struct Kernels {
    const char* name;

    // Blocks that a task of `multiply` should have, or a multiple.
    size_t task_blocks;

    // How this many rows have to lie for `multiply`.
    RowLayout (*row_layout)(size_t count);

    // Writes the rounded row and its sum, and returns its scale: value = scale * rounded. A row with a number that is
    // not finite has the scale NaN. `values`: where the row begins. `scratch` [depth].
    float (*quantize_row)(const RowInput& input, float* scratch, RowLayout layout, int8_t* values, int32_t* sum);

    // output [count, outputs] at the columns of blocks first to end. `rows` may be some of those whose layout it is,
    // from the beginning of a group on.
    void (*multiply)(const Rows& rows, const PackedWeight& weight, size_t first, size_t end, float* output);

    // Of `vocab_size` logits the `top_k` most probable tokens, the lowest id first among equals, their log
    // probabilities and the entropies. A logit of -inf has no share. With a NaN, +inf, or nothing but -inf all floats
    // are NaN.
    RowEntropies (*read_logits)(
        const float* logits, size_t vocab_size, size_t top_k, int64_t* top_ids, float* top_logprobs);

    const AttentionKernels* attention;
};

// Kinds with the same lanes differ in the product alone.
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* amx_kernels();
const Kernels* amx_emulated_kernels();

// Those of this machine, or of the environment variable FLY_TRT_CPU_ISA. Throws std::runtime_error where there are
// none, or not the asked-for ones.
const Kernels& kernels();

}  // namespace fly
