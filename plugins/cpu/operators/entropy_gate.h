// How uncertain a decoder is at each position, and which tokens it holds most probable.
//
// logits float32 [B, T, V], next_tokens int64 [B, T] -> argmax int64, entropy, entropy_topk, argmax_logprob,
// token_logprob float32 [B, T], top_ids int64, top_logprobs float32 [B, T, top_k], as EntropyGate of
// build/fly_build/head.py. The entropy of the whole vocabulary costs one operation for 16 logits and is always given.
// token_logprob is NaN for what is no token.
#pragma once

#include "../kernels/kernels.h"
#include "operator.h"

namespace fly {

class EntropyGate {
   public:
    static constexpr const char* name = "EntropyGate";
    static constexpr Slot inputs[] = {{ElementType::kFloat}, {ElementType::kInt64}};
    static constexpr Slot outputs[] = {
        {ElementType::kInt64}, {ElementType::kFloat}, {ElementType::kFloat}, {ElementType::kFloat},
        {ElementType::kFloat}, {ElementType::kInt64}, {ElementType::kFloat},
    };

    explicit EntropyGate(const Attributes& attributes);
    void compute(const Context& context) const;

   private:
    const Kernels& kernels_;
    size_t top_k_;
};

}  // namespace fly
