// The kernel of LooseWindowAccept: one warp per row.
#pragma once

#include "loose_window_accept.h"
#include "window_walk.cuh"

namespace fly::loose_window_accept {

__device__ __forceinline__ int64_t bounded(int64_t value, int64_t lowest, int64_t highest) {
    return value < lowest ? lowest : value > highest ? highest : value;
}

// An index as ONNX takes it, negative ones counted from the end, kept inside the row whatever it is.
__device__ __forceinline__ int64_t wrapped(int64_t index, int64_t size) {
    return bounded(index < 0 ? index + size : index, 0, size - 1);
}

// One row: its tokens, its policy and the end of its draft positions.
struct Evidence {
    int64_t const* drafts;   // [T]
    int64_t const* choices;  // [T]
    float const* gate;       // [T]
    float entropyThreshold;
    int64_t window;
    int64_t lookahead;
    int64_t end;
    int64_t numTokens;
    int64_t const* stopTokenIds;
    int64_t numStopTokens;

    __device__ __forceinline__ int64_t draftToken(int64_t position) const { return drafts[position]; }
    __device__ __forceinline__ int64_t choice(int64_t position) const { return choices[position]; }

    __device__ __forceinline__ bool isStop(int64_t token) const {
        for (int64_t i = 0; i < numStopTokens; ++i) {
            if (stopTokenIds[i] == token) return true;
        }
        return false;
    }

    // Whether the mismatch at `position` stands, given the next one's position.
    __device__ __forceinline__ bool isLoosened(
        int64_t position, int64_t nextMismatch, int64_t draft, int64_t target) const {
        if (!(gate[position] >= entropyThreshold)) return false;  // nor where either is a NaN
        int64_t const room = window > lookahead ? window : lookahead;
        if (position + room >= end) return false;
        int64_t lastAhead = position + lookahead;
        lastAhead = wrapped(lastAhead < numTokens ? lastAhead : numTokens - 1, numTokens);
        if (lastAhead < position || nextMismatch <= lastAhead) return false;
        return !isStop(draft) && !isStop(target);
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
    Evidence const evidence{drafts, choices, entropies + row * args.numTokens, args.entropyThreshold[row],
        bounded(args.window[row], -kFar, kFar), bounded(args.lookahead[row], -kFar, kFar), end, args.numTokens,
        args.stopTokenIds, args.numStopTokens};

    int64_t const first = begin > 0 ? begin : 0;
    int64_t const limit = end < args.numTokens ? end : args.numTokens;
    int64_t const numAccepted = first < limit ? firstRejected(evidence, first, limit, lane) - first : 0;
    if (lane != 0) return;
    args.numAccepted[row] = numAccepted;
    args.nextToken[row] = choices[wrapped(begin + numAccepted, args.numTokens)];
}

}  // namespace fly::loose_window_accept
