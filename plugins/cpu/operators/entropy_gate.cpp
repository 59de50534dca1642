#include "entropy_gate.h"

#include <algorithm>
#include <limits>

namespace fly {
namespace {

constexpr size_t kTaskLogits = 16384;  // that one thread reads before others are worth waking

}  // namespace

EntropyGate::EntropyGate(const Attributes& attributes)
    : kernels_(kernels()),
      top_k_(static_cast<size_t>(attributes.integer("top_k", 1))) {}

void EntropyGate::compute(const Context& context) const {
    const Tensor logits = context.input(0), next_tokens = context.input(1);
    const size_t count = logits.shape.rows(), vocab_size = logits.shape.last();
    const Shape& places = next_tokens.shape;
    require(1 <= top_k_ && top_k_ <= vocab_size, "top_k is not within the vocabulary");
    require(next_tokens.count() == count, "logits and next_tokens differ in their rows");
    auto* argmax = context.output<int64_t>(0, places);
    auto* entropy = context.output<float>(1, places);
    auto* entropy_topk = context.output<float>(2, places);
    auto* argmax_logprob = context.output<float>(3, places);
    auto* token_logprob = context.output<float>(4, places);
    auto* top_ids = context.output<int64_t>(5, logits.shape.with_last(top_k_));
    auto* top_logprobs = context.output<float>(6, logits.shape.with_last(top_k_));
    const auto read = [&](size_t row) {
        const float* values = logits.as<float>() + row * vocab_size;
        int64_t* ids = top_ids + row * top_k_;
        float* logprobs = top_logprobs + row * top_k_;
        const RowEntropies found = kernels_.read_logits(values, vocab_size, top_k_, ids, logprobs);
        argmax[row] = ids[0];
        entropy[row] = found.entropy;
        entropy_topk[row] = found.entropy_topk;
        argmax_logprob[row] = logprobs[0];
        const auto token = static_cast<size_t>(next_tokens.as<int64_t>()[row]);
        token_logprob[row] = token < vocab_size ? static_cast<float>(values[token] - found.largest - found.log_sum)
                                                : std::numeric_limits<float>::quiet_NaN();
    };
    const size_t step = std::max<size_t>(1, kTaskLogits / vocab_size);
    context.parallel(parts(count, step), [&](size_t task) {
        for (size_t row = task * step; row < std::min(count, (task + 1) * step); ++row) read(row);
    });
}

}  // namespace fly
