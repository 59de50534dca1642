// How many draft tokens of each row stand under FLy's rule (rule/window_rule.h), and which token follows them.
//
// next_tokens, argmax int64 [B, T], entropy, entropy_topk float32 [B, T], num_context, num_draft int64 [B],
// entropy_threshold float32 [B], use_full_entropy bool [B], window, lookahead int64 [B], stop_token_ids int64 [N]
// -> num_accepted, next_token int64 [B], as LooseWindowAccept of build/fly_build/head.py.
#pragma once

#include "operator.h"

namespace fly {

class LooseWindowAccept {
   public:
    static constexpr const char* name = "LooseWindowAccept";
    static constexpr Slot inputs[] = {
        {ElementType::kInt64}, {ElementType::kInt64}, {ElementType::kFloat}, {ElementType::kFloat},
        {ElementType::kInt64}, {ElementType::kInt64}, {ElementType::kFloat}, {ElementType::kBool},
        {ElementType::kInt64}, {ElementType::kInt64}, {ElementType::kInt64},
    };
    static constexpr Slot outputs[] = {{ElementType::kInt64}, {ElementType::kInt64}};

    explicit LooseWindowAccept(const Attributes&) {}
    void compute(const Context& context) const;
};

}  // namespace fly
