// The kernel of LooseWindowAccept: one warp per row.
#pragma once

#include "cpu/rule/window_rule.h"
#include "loose_window_accept.h"
#include "window_walk.cuh"

namespace fly::loose_window_accept {

__global__ void __launch_bounds__(kWarpSize) acceptRows(LooseWindowAcceptArgs args) {
    int64_t const row = blockIdx.x;
    int32_t const lane = static_cast<int32_t>(threadIdx.x);
    int64_t const first = row * args.numTokens;
    float const* const entropies = args.useFullEntropy[row] != 0 ? args.entropy : args.entropyTopk;
    window_rule::Row const rule(args.nextTokens + first, args.argmax + first, entropies + first, args.numTokens,
        args.stopTokenIds, args.numStopTokens,
        {args.numContext[row], args.numDraft[row], args.entropyThreshold[row], args.window[row], args.lookahead[row]});
    bool const hasDrafts = rule.first() < rule.limit();
    int64_t const numAccepted =
        hasDrafts ? firstRejected(rule, rule.first(), rule.limit(), lane) - rule.first() : 0;
    if (lane != 0) return;
    args.numAccepted[row] = numAccepted;
    args.nextToken[row] = rule.tokenAfter(numAccepted);
}

}  // namespace fly::loose_window_accept
