#include "int8_linear.h"

#include <algorithm>

namespace fly {
namespace {

constexpr size_t kRoundedAtOnce = 8192;    // values that one thread rounds before others are worth waking
constexpr size_t kTaskBytes = 16 << 10;    // of weights, for each block that a task should have
constexpr size_t kSliceBytes = 512 << 10;  // of rounded rows, which stay in a core's second cache for all weights

size_t task_blocks(size_t padded_depth, size_t at_least) {
    return std::max<size_t>(1, kTaskBytes / (padded_depth * kBlock)) * at_least;
}

// Rows of a task: all, or about equal shares of many. Whole pairs of groups, as some kinds take them.
size_t slice_rows(size_t count, size_t padded_depth, const RowLayout& layout) {
    const size_t pair = 2 * layout.group, most = std::max<size_t>(1, kSliceBytes / (padded_depth * pair));
    const size_t pairs = parts(count, pair);
    return parts(pairs, parts(pairs, most)) * pair;
}

}  // namespace

Int8Linear::Int8Linear(const Attributes& attributes)
    : kernels_(kernels()),
      prologue_(static_cast<Prologue>(attributes.integer("prologue", 0))),
      epsilon_(attributes.number("epsilon", 0.0F)) {
    require(Prologue::kNone <= prologue_ && prologue_ <= Prologue::kGeluTanh, "prologue is 0, 1, 2 or 3");
}

void Int8Linear::compute(const Context& context) const {
    const Tensor x = context.input(0), packed = context.input(1), scales = context.input(2);
    const Tensor norm = context.input(3), bias = context.input(4), residual = context.input(5);
    const bool is_gated = prologue_ == Prologue::kSilu || prologue_ == Prologue::kGeluTanh;
    const size_t count = x.shape.rows(), width = x.shape.last();
    const size_t depth = is_gated ? width / 2 : width;
    const size_t outputs = scales.count(), num_blocks = parts(outputs, kBlock),
                 padded_depth = parts(depth, kDepthStep) * kDepthStep;
    require(depth > 0 && (!is_gated || width % 2 == 0), "x is [..., K], or [..., 2 K] for a gated activation");
    require(
        packed.shape.is({num_blocks, padded_depth / 4, kBlock, 4}),
        "weight is [N / 16, K / 4, 16, 4], padded up to 16 outputs and 64 inputs, for scales [N]");
    require(prologue_ != Prologue::kRmsNorm || norm.present, "an RMS norm has a weight");
    require((!norm || norm.count() == depth) && (!bias || bias.count() == outputs), "norm is [K] and bias [N]");
    require(!residual || residual.shape == x.shape.with_last(outputs), "residual has the shape of y");
    float* y = context.output<float>(0, x.shape.with_last(outputs));
    if (count == 0) return;

    const RowLayout layout = kernels_.row_layout(count);
    const size_t size = layout.size(count, padded_depth), groups = layout.groups(count);
    Scratch& scratch = Scratch::of_thread();
    scratch.reserve({size, count * sizeof(int32_t), count * sizeof(float)});
    auto* values = scratch.take<int8_t>(size);
    auto* sums = scratch.take<int32_t>(count);
    auto* row_scales = scratch.take<float>(count);
    // A group's rows lie between each other: two threads would write to the same lines of the cache.
    const size_t prepared_size = prologue_ == Prologue::kNone ? 0 : depth;
    share(context, groups, count * depth <= kRoundedAtOnce, prepared_size, [&](size_t group, float* prepared) {
        for (size_t row = group * layout.group; row < std::min(count, (group + 1) * layout.group); ++row) {
            const RowInput input = {
                x.as<float>() + row * width, norm.as<float>(), prologue_, epsilon_, depth, padded_depth};
            int8_t* rounded = values + layout.start(row, padded_depth);
            row_scales[row] = kernels_.quantize_row(input, prepared, layout, rounded, sums + row);
        }
    });

    const size_t step = task_blocks(padded_depth, kernels_.task_blocks), tasks = parts(num_blocks, step);
    const size_t slice = slice_rows(count, padded_depth, layout), slices = parts(count, slice);
    context.parallel(slices * tasks, [&](size_t task) {
        const size_t row = task / tasks * slice, first = task % tasks * step;
        const size_t num_rows = std::min(slice, count - row);
        const Rows rows = {values + row * padded_depth, sums + row, row_scales + row, num_rows, padded_depth, layout};
        const float* more = residual ? residual.as<float>() + row * outputs : nullptr;
        const PackedWeight weight = {packed.as<uint8_t>(), scales.as<float>(), bias.as<float>(), more, outputs};
        kernels_.multiply(rows, weight, first, std::min(num_blocks, first + step), y + row * outputs);
    });
}

}  // namespace fly
