// The kernel of LooseWindowAccept: one warp per row walks the draft positions from the last to the first, 32 at a
// time.
//
// Backwards, because whether a mismatch is loosened depends on where the next one is; that is then known from the
// ballots of the positions after it, and the last rejected position seen is the first of the row.
#pragma once

#include "loose_window_accept.h"

namespace fly::loose_window_accept {

inline constexpr int32_t kWarpSize = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;
// Far beyond any position, and sums of a few stay within int64.
inline constexpr int64_t kFar = int64_t{1} << 60;

__device__ __forceinline__ int64_t bounded(int64_t value, int64_t lowest, int64_t highest) {
    return value < lowest ? lowest : value > highest ? highest : value;
}

// An index as ONNX takes it, negative ones counted from the end, kept inside the row whatever it is.
__device__ __forceinline__ int64_t wrapped(int64_t index, int64_t size) {
    return bounded(index < 0 ? index + size : index, 0, size - 1);
}

// One row's policy and the end of its draft positions.
struct Policy {
    float const* gate;  // [T]
    float entropyThreshold;
    int64_t window;
    int64_t lookahead;
    int64_t end;
    int64_t numTokens;
    int64_t const* stopTokenIds;
    int64_t numStopTokens;

    __device__ __forceinline__ bool isStop(int64_t token) const {
        for (int64_t i = 0; i < numStopTokens; ++i) {
            if (stopTokenIds[i] == token) return true;
        }
        return false;
    }

    // Whether the mismatch at `position` stands, given the next one's position.
    __device__ __forceinline__ bool isLoosened(
        int64_t position, int64_t nextMismatch, int64_t draftToken, int64_t choice) const {
        if (!(gate[position] >= entropyThreshold)) return false;  // nor where either is a NaN
        int64_t const room = window > lookahead ? window : lookahead;
        if (position + room >= end) return false;
        int64_t lastAhead = position + lookahead;
        lastAhead = wrapped(lastAhead < numTokens ? lastAhead : numTokens - 1, numTokens);
        if (lastAhead < position || nextMismatch <= lastAhead) return false;
        return !isStop(draftToken) && !isStop(choice);
    }
};

__global__ void __launch_bounds__(kWarpSize) acceptRows(LooseWindowAcceptArgs args) {
    int64_t const row = blockIdx.x;
    int32_t const lane = static_cast<int32_t>(threadIdx.x);
    int64_t const* const drafts = args.nextTokens + row * args.numTokens;
    int64_t const* const choices = args.argmax + row * args.numTokens;
    int64_t const begin = bounded(args.numContext[row], -kFar, kFar) - 1;
    int64_t const end = begin + bounded(args.numDraft[row], -kFar, kFar);
    float const* const entropies = args.useFullEntropy[row] != 0 ? args.entropy : args.entropyTopk;
    Policy const policy{entropies + row * args.numTokens, args.entropyThreshold[row],
        bounded(args.window[row], -kFar, kFar), bounded(args.lookahead[row], -kFar, kFar), end, args.numTokens,
        args.stopTokenIds, args.numStopTokens};

    int64_t const first = begin > 0 ? begin : 0;
    int64_t const limit = end < args.numTokens ? end : args.numTokens;
    int64_t numAccepted = 0;
    if (first < limit) {
        int64_t firstRejected = limit;
        int64_t nextMismatch = kFar;
        for (int64_t base = first + (limit - first - 1) / kWarpSize * kWarpSize; base >= first; base -= kWarpSize) {
            int64_t const position = base + lane;
            int64_t const draftToken = position < limit ? drafts[position] : 0;
            int64_t const choice = position < limit ? choices[position] : 0;
            bool const mismatch = draftToken != choice;
            uint32_t const mismatches = __ballot_sync(kAllLanes, mismatch);
            bool rejected = false;
            if (mismatch) {
                uint32_t const later = mismatches & (kAllLanes << 1 << lane);
                int64_t const next = later != 0 ? base + __ffs(static_cast<int>(later)) - 1 : nextMismatch;
                rejected = !policy.isLoosened(position, next, draftToken, choice);
            }
            uint32_t const rejections = __ballot_sync(kAllLanes, rejected);
            if (rejections != 0) firstRejected = base + __ffs(static_cast<int>(rejections)) - 1;
            if (mismatches != 0) nextMismatch = base + __ffs(static_cast<int>(mismatches)) - 1;
        }
        numAccepted = firstRejected - first;
    }
    if (lane != 0) return;
    args.numAccepted[row] = numAccepted;
    args.nextToken[row] = choices[wrapped(begin + numAccepted, args.numTokens)];
}

}  // namespace fly::loose_window_accept
