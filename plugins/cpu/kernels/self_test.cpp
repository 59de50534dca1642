#include "self_test.h"

#include <algorithm>
#include <vector>

namespace fly {
namespace {

constexpr size_t kDepth = 2 * kDepthStep, kBlocks = 5, kOutputs = kBlocks * kBlock - 5, kRows = 35;

// -127..127 and 0..128, and all of them.
int8_t value(size_t row, size_t k) {
    return static_cast<int8_t>(static_cast<int>((row * 89 + k * 37 + row * k) % 255) - 127);
}
uint8_t weight(size_t output, size_t k) { return static_cast<uint8_t>((output * 53 + k * 29 + output * k) % 129); }

struct Case {
    std::vector<int8_t> values;    // [kRows, kDepth]
    std::vector<int32_t> sums;     // [kRows]
    std::vector<uint8_t> packed;   // of the weight
    std::vector<float> expected;   // [kRows, kOutputs], with scales of 1: whole numbers below 2^24, without rounding
};

Case make_case() {
    Case made;
    made.packed.resize(kBlocks * kBlock * kDepth);
    for (size_t n = 0; n < kBlocks * kBlock; ++n)
        for (size_t k = 0; k < kDepth; ++k)
            made.packed[n / kBlock * kBlock * kDepth + k / 4 * 4 * kBlock + n % kBlock * 4 + k % 4] = weight(n, k);
    std::vector<int> centred(kOutputs * kDepth);
    for (size_t n = 0; n < kOutputs; ++n)
        for (size_t k = 0; k < kDepth; ++k) centred[n * kDepth + k] = weight(n, k) - kWeightOffset;
    for (size_t row = 0; row < kRows; ++row) {
        int32_t sum = 0;
        for (size_t k = 0; k < kDepth; ++k) {
            made.values.push_back(value(row, k));
            sum += value(row, k);
        }
        made.sums.push_back(sum);
        for (size_t n = 0; n < kOutputs; ++n) {
            int32_t total = 0;
            for (size_t k = 0; k < kDepth; ++k) total += made.values[row * kDepth + k] * centred[n * kDepth + k];
            made.expected.push_back(static_cast<float>(total));
        }
    }
    return made;
}

bool multiplies_rightly(const Kernels& kernels, const Case& right, size_t count) {
    const RowLayout layout = kernels.row_layout(count);
    const size_t step = layout.group * layout.chunk;
    std::vector<int8_t> values(layout.size(count, kDepth));
    for (size_t row = 0; row < count; ++row)
        for (size_t k = 0; k < kDepth; ++k)
            values[layout.start(row, kDepth) + k / layout.chunk * step + k % layout.chunk] = right.values[row * kDepth + k];
    const std::vector<float> ones(kRows + kOutputs, 1.0F);
    std::vector<float> outputs(count * kOutputs);
    const Rows rows = {values.data(), right.sums.data(), ones.data(), count, kDepth, layout};
    const PackedWeight weights = {right.packed.data(), ones.data(), nullptr, nullptr, kOutputs};
    kernels.multiply(rows, weights, 0, kBlocks, outputs.data());
    return std::equal(outputs.begin(), outputs.end(), right.expected.begin());
}

}  // namespace

bool multiplies_rightly(const Kernels& kernels) {
    const Case right = make_case();
    for (const size_t count : {size_t{1}, size_t{20}, kRows})
        if (!multiplies_rightly(kernels, right, count)) return false;
    return true;
}

}  // namespace fly
