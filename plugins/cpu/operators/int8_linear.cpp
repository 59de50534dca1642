#include "int8_linear.h"

#include <algorithm>

namespace fly {
namespace {

constexpr size_t kRowsAtOnce = 4096;      // values that one thread rounds before others are worth waking
constexpr size_t kTaskBytes = 48 << 10;  // of weights, for one task

size_t task_blocks(size_t padded_depth) {
    const size_t blocks = kTaskBytes / (padded_depth * kBlock);
    return std::max<size_t>(3, blocks / 3 * 3);
}

}  // namespace

Int8Linear::Int8Linear(const Attributes& attributes)
    : kernels_(kernels()),
      prologue_(static_cast<Prologue>(attributes.integer("prologue", 0))),
      epsilon_(attributes.number("epsilon", 0.0F)) {}

void Int8Linear::compute(const Context& context) const {
    const Tensor x = context.input(0), packed = context.input(1), scales = context.input(2);
    const Tensor norm = context.input(3), bias = context.input(4), residual = context.input(5);
    const bool is_gated = prologue_ == Prologue::kSilu || prologue_ == Prologue::kGeluTanh;
    const size_t count = x.shape.rows(), width = x.shape.last();
    const size_t depth = is_gated ? width / 2 : width;
    const size_t num_blocks = packed.shape[0], padded_depth = packed.shape[1] * 4;
    const size_t outputs = scales.shape[0];
    if (padded_depth < depth || num_blocks * kBlock < outputs)
        throw Failure("Int8Linear: the packed weight is smaller than the layer");
    float* y = context.output<float>(0, x.shape.with_last(outputs));
    if (count == 0) return;

    const RowLayout layout = kernels_.row_layout(count);
    const size_t size = layout.size(count, padded_depth);
    Scratch& scratch = Scratch::of_thread();
    scratch.reserve({size, count * sizeof(int32_t), count * sizeof(float), count * depth * sizeof(float)});
    auto* values = scratch.take<int8_t>(size);
    auto* sums = scratch.take<int32_t>(count);
    auto* row_scales = scratch.take<float>(count);
    auto* prepared = scratch.take<float>(count * depth);
    const auto quantize = [&](size_t row) {
        const RowInput input = {x.as<float>() + row * width, norm.as<float>(), prologue_, epsilon_, depth, padded_depth};
        int8_t* rounded = values + layout.start(row, padded_depth);
        row_scales[row] = kernels_.quantize_row(input, prepared + row * depth, layout, rounded, sums + row);
    };
    if (count * depth <= kRowsAtOnce)
        for (size_t row = 0; row < count; ++row) quantize(row);
    else
        context.parallel(count, quantize);

    const Rows rows = {values, sums, row_scales, count, padded_depth, layout};
    const PackedWeight weight = {packed.as<uint8_t>(), scales.as<float>(), bias.as<float>(), residual.as<float>(), outputs};
    const size_t step = task_blocks(padded_depth);
    context.parallel((num_blocks + step - 1) / step, [&](size_t task) {
        const size_t first = task * step;
        kernels_.multiply(rows, weight, first, std::min(num_blocks, first + step), y);
    });
}

}  // namespace fly
