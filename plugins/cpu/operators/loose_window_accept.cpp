#include "loose_window_accept.h"

#include "../rule/window_rule.h"

namespace fly {
namespace {

// The first draft position that is neither the target's choice nor loosened, or the limit. From the last to the first:
// whether a mismatch is loosened depends on where the next one is.
int64_t first_rejected(const window_rule::Row& row) {
    int64_t found = row.limit(), next_mismatch = window_rule::kFar;
    for (int64_t position = row.limit() - 1; position >= row.first(); --position) {
        const int64_t draft = row.draftToken(position), choice = row.choice(position);
        if (draft == choice) continue;
        if (!row.isLoosened(position, next_mismatch, draft, choice)) found = position;
        next_mismatch = position;
    }
    return found;
}

}  // namespace

void LooseWindowAccept::compute(const Context& context) const {
    const Tensor next_tokens = context.input(0), argmax = context.input(1);
    const Tensor entropy = context.input(2), entropy_topk = context.input(3);
    const Tensor num_context = context.input(4), num_draft = context.input(5), threshold = context.input(6);
    const Tensor use_full_entropy = context.input(7), window = context.input(8), lookahead = context.input(9);
    const Tensor stops = context.input(10);
    const int64_t length = argmax.shape.last(), count = argmax.shape.rows();
    require(length > 0, "rows of no tokens");
    for (const Tensor* of_tokens : {&next_tokens, &entropy, &entropy_topk})
        require(of_tokens->count() == argmax.count(), "next_tokens, argmax, entropy and entropy_topk are [B, T]");
    for (const Tensor* of_rows : {&num_context, &num_draft, &threshold, &use_full_entropy, &window, &lookahead})
        require(of_rows->count() == static_cast<size_t>(count), "a row's numbers are [B]");
    auto* num_accepted = context.output<int64_t>(0, num_context.shape);
    auto* next_token = context.output<int64_t>(1, num_context.shape);
    for (int64_t b = 0; b < count; ++b) {
        const int64_t at = b * length;
        const float* gate = (use_full_entropy.as<bool>()[b] ? entropy : entropy_topk).as<float>() + at;
        const window_rule::RowPolicy policy = {
            num_context.as<int64_t>()[b], num_draft.as<int64_t>()[b], threshold.as<float>()[b], window.as<int64_t>()[b],
            lookahead.as<int64_t>()[b]};
        const window_rule::Row row(
            next_tokens.as<int64_t>() + at, argmax.as<int64_t>() + at, gate, length, stops.as<int64_t>(),
            stops.shape.count(), policy);
        num_accepted[b] = row.first() < row.limit() ? first_rejected(row) - row.first() : 0;
        next_token[b] = row.tokenAfter(num_accepted[b]);
    }
}

}  // namespace fly
