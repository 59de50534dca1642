// FLy's rule for one mismatch of one sequence, as plain C++ that the CPU's operator and the CUDA kernel share.
//
// It knows a row's tokens and policy; in which order positions are looked at is the caller's. Whatever the row's
// numbers are, nothing outside it is read.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FLY_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLY_HOST_DEVICE inline
#endif

namespace fly::window_rule {

// Far beyond any position, and sums of a few stay within int64.
inline constexpr int64_t kFar = int64_t{1} << 60;

FLY_HOST_DEVICE int64_t bounded(int64_t value, int64_t lowest, int64_t highest) {
    return value < lowest ? lowest : value > highest ? highest : value;
}

// An index as ONNX takes it, negative ones counted from the end, kept inside the row whatever it is.
FLY_HOST_DEVICE int64_t wrapped(int64_t index, int64_t size) {
    return bounded(index < 0 ? index + size : index, 0, size - 1);
}

// The numbers of a row that its caller gives, each of any size.
struct RowPolicy {
    int64_t numContext;
    int64_t numDraft;
    float entropyThreshold;
    int64_t window;
    int64_t lookahead;
};

// One row: its tokens, its policy and where its draft positions begin and end.
struct Row {
    int64_t const* drafts;   // [T]
    int64_t const* choices;  // [T]
    float const* gate;       // [T]
    int64_t numTokens;
    int64_t const* stopTokenIds;
    int64_t numStopTokens;
    float entropyThreshold;
    int64_t window;
    int64_t lookahead;
    int64_t begin;
    int64_t end;

    FLY_HOST_DEVICE Row(
        int64_t const* rowDrafts, int64_t const* rowChoices, float const* rowGate, int64_t length, int64_t const* stops,
        int64_t numStops, RowPolicy const& policy)
        : drafts(rowDrafts),
          choices(rowChoices),
          gate(rowGate),
          numTokens(length),
          stopTokenIds(stops),
          numStopTokens(numStops),
          entropyThreshold(policy.entropyThreshold),
          window(bounded(policy.window, -kFar, kFar)),
          lookahead(bounded(policy.lookahead, -kFar, kFar)),
          begin(bounded(policy.numContext, -kFar, kFar) - 1),
          end(begin + bounded(policy.numDraft, -kFar, kFar)) {}

    // The draft positions that lie in the row: [first, limit).
    FLY_HOST_DEVICE int64_t first() const { return begin > 0 ? begin : 0; }
    FLY_HOST_DEVICE int64_t limit() const { return end < numTokens ? end : numTokens; }

    FLY_HOST_DEVICE int64_t draftToken(int64_t position) const { return drafts[position]; }
    FLY_HOST_DEVICE int64_t choice(int64_t position) const { return choices[position]; }
    FLY_HOST_DEVICE int64_t tokenAfter(int64_t numAccepted) const {
        return choices[wrapped(begin + numAccepted, numTokens)];
    }

    FLY_HOST_DEVICE bool isStop(int64_t token) const {
        for (int64_t i = 0; i < numStopTokens; ++i) {
            if (stopTokenIds[i] == token) return true;
        }
        return false;
    }

    // Whether the mismatch at `position` stands, given the next one's position, or kFar where there is none.
    FLY_HOST_DEVICE bool isLoosened(int64_t position, int64_t nextMismatch, int64_t draft, int64_t target) const {
        if (!(gate[position] >= entropyThreshold)) return false;  // nor where either is a NaN
        int64_t const room = window > lookahead ? window : lookahead;
        if (position + room >= end) return false;
        int64_t lastAhead = position + lookahead;
        lastAhead = wrapped(lastAhead < numTokens ? lastAhead : numTokens - 1, numTokens);
        if (lastAhead < position || nextMismatch <= lastAhead) return false;
        return !isStop(draft) && !isStop(target);
    }
};

}  // namespace fly::window_rule
