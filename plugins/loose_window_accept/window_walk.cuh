// FLy's rule over the draft positions of one sequence: a warp walks from the last to the first, 32 at a time.
//
// Backwards, because whether a mismatch is loosened depends on where the next one is; that is then known from the
// ballots of the positions after it, and the last rejected position seen is the first of the sequence. What the rule
// asks of a position is the caller's `Evidence`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/rule/window_rule.h"

namespace fly::loose_window_accept {

inline constexpr int32_t kWarpSize = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// The first of the positions [first, limit) whose draft token neither is the target's choice nor is loosened, or limit.
// Evidence has draftToken(position), choice(position) and isLoosened(position, nextMismatch, draft, target), which a
// mismatch's lane calls once, with the position of the next mismatch or window_rule::kFar. There is at least one position.
template <typename Evidence>
__device__ __forceinline__ int64_t firstRejected(
    Evidence const& evidence, int64_t first, int64_t limit, int32_t lane) {
    int64_t found = limit;
    int64_t nextMismatch = window_rule::kFar;
    for (int64_t base = first + (limit - first - 1) / kWarpSize * kWarpSize; base >= first; base -= kWarpSize) {
        int64_t const position = base + lane;
        int64_t const draft = position < limit ? evidence.draftToken(position) : 0;
        int64_t const target = position < limit ? evidence.choice(position) : 0;
        bool const mismatch = draft != target;
        uint32_t const mismatches = __ballot_sync(kAllLanes, mismatch);
        bool rejected = false;
        if (mismatch) {
            uint32_t const later = mismatches & (kAllLanes << 1 << lane);
            int64_t const next = later != 0 ? base + __ffs(static_cast<int>(later)) - 1 : nextMismatch;
            rejected = !evidence.isLoosened(position, next, draft, target);
        }
        uint32_t const rejections = __ballot_sync(kAllLanes, rejected);
        if (rejections != 0) found = base + __ffs(static_cast<int>(rejections)) - 1;
        if (mismatches != 0) nextMismatch = base + __ffs(static_cast<int>(mismatches)) - 1;
    }
    return found;
}

}  // namespace fly::loose_window_accept
