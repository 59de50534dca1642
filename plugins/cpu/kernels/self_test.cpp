#include "self_test.h"

#include <vector>

namespace fly {
namespace {

constexpr size_t kDepth = 2 * kDepthStep, kBlocks = 3, kOutputs = kBlocks * kBlock - 5;

// -127..127, and all of them.
int8_t value(size_t row, size_t k) { return static_cast<int8_t>(static_cast<int>((row * 89 + k * 37 + row * k) % 255) - 127); }
uint8_t weight(size_t output, size_t k) { return static_cast<uint8_t>((output * 53 + k * 29 + output * k) % 129); }

// Scales of 1 and sums below 2^24: the outputs are whole numbers, without rounding.
bool multiplies_rightly(const Kernels& kernels, size_t count, const std::vector<uint8_t>& packed) {
    const RowLayout layout = kernels.row_layout(count);
    std::vector<int8_t> values(layout.size(count, kDepth));
    std::vector<int32_t> sums(count);
    const std::vector<float> ones(count + kOutputs, 1.0F);
    std::vector<float> outputs(count * kOutputs);
    for (size_t row = 0; row < count; ++row)
        for (size_t k = 0; k < kDepth; ++k) {
            const size_t step = layout.group * layout.chunk;
            values[layout.start(row, kDepth) + k / layout.chunk * step + k % layout.chunk] = value(row, k);
            sums[row] += value(row, k);
        }
    const Rows rows = {values.data(), sums.data(), ones.data(), count, kDepth, layout};
    const PackedWeight weights = {packed.data(), ones.data(), nullptr, nullptr, kOutputs};
    kernels.multiply(rows, weights, 0, kBlocks, outputs.data());
    for (size_t row = 0; row < count; ++row)
        for (size_t n = 0; n < kOutputs; ++n) {
            int32_t sum = 0;
            for (size_t k = 0; k < kDepth; ++k) sum += value(row, k) * (weight(n, k) - kWeightOffset);
            if (outputs[row * kOutputs + n] != static_cast<float>(sum)) return false;
        }
    return true;
}

}  // namespace

bool multiplies_rightly(const Kernels& kernels) {
    std::vector<uint8_t> packed(kBlocks * kBlock * kDepth);
    for (size_t n = 0; n < kBlocks * kBlock; ++n)
        for (size_t k = 0; k < kDepth; ++k)
            packed[n / kBlock * kBlock * kDepth + k / 4 * 4 * kBlock + n % kBlock * 4 + k % 4] = weight(n, k);
    return multiplies_rightly(kernels, 1, packed) && multiplies_rightly(kernels, 35, packed);
}

}  // namespace fly
