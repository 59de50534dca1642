#include "self_test.h"

#include <algorithm>
#include <cmath>
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
    std::vector<int8_t> values;   // [kRows, kDepth]
    std::vector<int32_t> sums;    // [kRows]
    std::vector<uint8_t> packed;  // of the weight
    std::vector<float> expected;  // [kRows, kOutputs], with scales of 1: whole numbers below 2^24, without rounding
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
            values[layout.start(row, kDepth) + k / layout.chunk * step + k % layout.chunk] =
                right.values[row * kDepth + k];
    const std::vector<float> ones(kRows + kOutputs, 1.0F);
    std::vector<float> outputs(count * kOutputs);
    const Rows rows = {values.data(), right.sums.data(), ones.data(), count, kDepth, layout};
    const PackedWeight weights = {right.packed.data(), ones.data(), nullptr, nullptr, kOutputs};
    kernels.multiply(rows, weights, 0, kBlocks, outputs.data());
    return std::equal(outputs.begin(), outputs.end(), right.expected.begin());
}

// What a row is before it is rounded.
double prepared(const RowInput& input, size_t k) {
    const double x = input.x[k];
    double squares = 0;
    switch (input.prologue) {
        case Prologue::kNone:
            return x;
        case Prologue::kRmsNorm:
            for (size_t i = 0; i < input.depth; ++i) squares += static_cast<double>(input.x[i]) * input.x[i];
            return x / std::sqrt(squares / static_cast<double>(input.depth) + input.epsilon) * input.weight[k];
        case Prologue::kSilu:
            return x / (1 + std::exp(-x)) * input.x[input.depth + k];
        case Prologue::kGeluTanh:
            return x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) / 2 * input.x[input.depth + k];
    }
    return x;
}

bool quantizes_rightly(const Kernels& kernels, Prologue prologue, size_t count) {
    constexpr size_t depth = kDepth - 30;
    const RowLayout layout = kernels.row_layout(count);
    const size_t step = layout.group * layout.chunk, row = count - 1;
    std::vector<float> x, weight, scratch(depth);
    for (size_t k = 0; k < 2 * depth; ++k) x.push_back(static_cast<float>(value(1, k)) / 30.0F);
    for (size_t k = 0; k < depth; ++k) weight.push_back(static_cast<float>(value(2, k)) / 90.0F);
    std::vector<int8_t> values(layout.size(count, kDepth), 1);
    int32_t sum = 0, total = 0;
    const RowInput input = {x.data(), weight.data(), prologue, 1e-5F, depth, kDepth};
    const float scale =
        kernels.quantize_row(input, scratch.data(), layout, values.data() + layout.start(row, kDepth), &sum);
    int largest = 0;
    for (size_t k = 0; k < kDepth; ++k) {
        const int code = values[layout.start(row, kDepth) + k / layout.chunk * step + k % layout.chunk];
        const double right = k < depth ? prepared(input, k) : 0.0;
        if (!(std::abs(code * static_cast<double>(scale) - right) <= 0.501 * scale)) return false;
        total += code;
        largest = std::max(largest, std::abs(code));
    }
    return largest == 127 && sum == total;
}

// Two query heads that share keys, some tokens behind cached ones, beyond the end of a chunk.
constexpr size_t kHeads = 2, kTokens = 5, kCached = kKeyChunk + 8, kCapacity = kKeyChunk + 32, kDim = 16;

// -1, -0.5, 0, 0.5 or 1, which both types hold exactly.
size_t choice(size_t key, size_t d, size_t what) { return (key * 7 + d * 3 + key * d + what * 11) % 5; }
float number(size_t key, size_t d, size_t what) { return static_cast<float>(choice(key, d, what)) / 2.0F - 1.0F; }
void put(size_t key, size_t d, size_t what, float* to) { *to = number(key, d, what); }
void put(size_t key, size_t d, size_t what, Half* to) {
    constexpr uint16_t bits[] = {0xBC00, 0xB800, 0x0000, 0x3800, 0x3C00};
    to->bits = bits[choice(key, d, what)];
}

// Of the token's query at all keys before it and its own.
bool is_right(const float* query, size_t token, const float* output) {
    double total = 0, sums[kDim] = {};
    for (size_t key = 0; key <= kCached + token; ++key) {
        double score = 0;
        for (size_t d = 0; d < kDim; ++d) score += static_cast<double>(query[d]) * number(key, d, 0);
        const double weight = std::exp(score / 4);
        total += weight;
        for (size_t d = 0; d < kDim; ++d) sums[d] += weight * number(key, d, 1);
    }
    for (size_t d = 0; d < kDim; ++d)
        if (!(std::abs(output[d] - sums[d] / total) < 1e-4)) return false;
    return true;
}

template <typename Element>
bool attends_rightly(const AttentionKernels& kernels) {
    constexpr size_t width = kHeads * kDim;
    std::vector<float> query(kTokens * width), key(kTokens * kDim), value(kTokens * kDim), output(kTokens * width);
    std::vector<Element> keys(kCapacity * kDim), values(kCapacity * kDim);
    for (size_t i = 0; i < query.size(); ++i) query[i] = number(i, 2, 2);
    for (size_t d = 0; d < kDim; ++d) {
        for (size_t at = 0; at < kCached; ++at) {
            put(at, d, 0, &keys[at / kKeyBlock * kKeyBlock * kDim + d * kKeyBlock + at % kKeyBlock]);
            put(at, d, 1, &values[at * kDim + d]);
        }
        for (size_t token = 0; token < kTokens; ++token) {
            key[token * kDim + d] = number(kCached + token, d, 0);
            value[token * kDim + d] = number(kCached + token, d, 1);
        }
    }
    const int64_t write_index = kCached;
    Attention a = {};
    a.query = query.data(), a.key = key.data(), a.value = value.data(), a.output = output.data();
    a.query_stride = width, a.key_stride = kDim, a.write_indices = &write_index;
    a.keys = keys.data(), a.values = values.data(), a.is_half = sizeof(Element) == sizeof(Half);
    a.batch = 1, a.tokens = kTokens, a.heads = kHeads, a.kv_heads = 1, a.head_dim = kDim, a.capacity = kCapacity;
    a.num_chunks = 2, a.scale = 0.25F;
    std::vector<float> scratch(a.scratch_size(a.rows()));
    kernels.store(a, 0, 0, kTokens, scratch.data());
    kernels.attend(a, {0, 0, 0, a.rows(), 0, a.num_chunks}, scratch.data(), nullptr);
    for (size_t i = 0; i < kTokens * kHeads; ++i)
        if (!is_right(&query[i * kDim], i / kHeads, &output[i * kDim])) return false;
    return true;
}

}  // namespace

bool computes_rightly(const Kernels& kernels) {
    const Case right = make_case();
    for (const size_t count : {size_t{1}, size_t{20}, kRows}) {
        if (!multiplies_rightly(kernels, right, count)) return false;
        for (const Prologue prologue : {Prologue::kNone, Prologue::kRmsNorm, Prologue::kSilu, Prologue::kGeluTanh})
            if (!quantizes_rightly(kernels, prologue, count)) return false;
    }
    return attends_rightly<float>(*kernels.attention) && attends_rightly<Half>(*kernels.attention);
}

}  // namespace fly
