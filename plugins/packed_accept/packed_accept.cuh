// The kernels of PackedLooseAccept: where the drafts of each sequence are, one pass over the rows that carry one, and
// the rule for each sequence, which rewrites single logits.
//
// Of S sequences with R rows exactly R - S rows carry a draft: all but the last of each sequence. So the shapes say how
// many blocks the second kernel needs, and the draft of a row has the row's index less that of its sequence.
//
// Which sequences are context requests follows from the lengths alone. They come first; a generation request has one
// token. So T - S is what the context requests have beyond one token each, and the sum of that over the sequences,
// from the first on, reaches T - S where the context requests end.
#pragma once

#include "packed_accept.h"

#include "entropy_gate/row_reduction.cuh"
#include "loose_window_accept/window_walk.cuh"

namespace fly::packed_accept {

using entropy_gate::ChunkResult;
using entropy_gate::kAllLanes;
using entropy_gate::kThreads;
using entropy_gate::kWarps;
using entropy_gate::kWarpSize;

// Neither is a token, and they differ, so that what is no token never agrees with a row that has no choice.
inline constexpr int32_t kNoChoice = -1;
inline constexpr int32_t kNoToken = -2;

// A loosened draft token's logit is above the maximum by 1, or by 1/64 of its size where that is more. The runtime
// looks for the largest value after it has scaled the logits and taken their softmax; values next to each other would
// often be one there.
inline constexpr float kLeastRaise = 1.0f;
inline constexpr float kRelativeRaise = 1.0f / 64.0f;

// The draft tokens of one sequence: drafts [first, first + count) of all.
struct Sequence {
    int32_t first;
    int32_t count;
};

// A row that carries a draft token, and what the target says there.
struct Draft {
    int32_t row;
    int32_t token;   // or kNoToken
    int32_t choice;  // the target's, or kNoChoice in a row with a NaN
    float gate;      // nats; a NaN never loosens
    float raised;    // what the token's logit is if it is loosened
    int32_t isLoosened;
};

struct Workspace {
    Sequence* sequences;  // [S]
    Draft* drafts;        // [R - S]
    void* chunks;         // ChunkResult [R - S, numChunks]
};

// How many of the rising ids are at most `limit`.
__device__ __forceinline__ int64_t countUpTo(int32_t const* ids, int64_t size, int64_t limit) {
    int64_t low = 0;
    while (size > 0) {
        int64_t const half = size / 2;
        bool const isBeyond = ids[low + half] > limit;
        low = isBeyond ? low : low + half + 1;
        size = isBeyond ? half : size - half - 1;
    }
    return low;
}

// One warp per sequence finds its rows and their draft tokens. Where tensors contradict each other a sequence has no
// drafts; what then is left of the drafts is never read as one.
__global__ void __launch_bounds__(kThreads) findDrafts(PackedLooseAcceptArgs args, Workspace workspace) {
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int64_t const sequence = int64_t{blockIdx.x} * kWarps + static_cast<int32_t>(threadIdx.x) / kWarpSize;
    if (sequence >= args.numSequences) return;
    int64_t const excess = args.numTokens - args.numSequences;
    int64_t before = 0;  // what the sequences in front have beyond one token each
    for (int64_t i = lane; i < sequence; i += kWarpSize) {
        int32_t const length = args.contextLengths[i];
        before += length > 1 ? length - 1 : 0;
    }
#pragma unroll
    for (int32_t distance = kWarpSize / 2; distance > 0; distance /= 2) {
        before += __shfl_xor_sync(kAllLanes, before, distance);
    }
    int32_t const length = args.contextLengths[sequence];
    int64_t count = 0;
    int64_t firstRow = 0;
    int64_t end = 0;  // how many tokens there are up to the sequence's last one
    if (length > 1 && before + length - 1 <= excess) {
        int64_t const begin = sequence + before;
        end = begin + length;
        firstRow = countUpTo(args.lastTokenIds, args.numRows, begin);
        count = countUpTo(args.lastTokenIds, args.numRows, end) - firstRow - 1;
        bool const hasDrafts = count > 0 && count < length && firstRow >= sequence &&
            firstRow - sequence + count <= args.numRows - args.numSequences &&
            args.lastTokenIds[firstRow] == end - count && args.lastTokenIds[firstRow + count] == end;
        if (!hasDrafts) count = 0;
    }
    int64_t const first = firstRow - sequence;
    if (lane == 0) workspace.sequences[sequence] = {static_cast<int32_t>(first), static_cast<int32_t>(count)};
    for (int64_t i = lane; i < count; i += kWarpSize) {
        Draft draft{};
        draft.row = static_cast<int32_t>(firstRow + i);
        int32_t const token = args.inputIds[end - count + i];
        draft.token = token >= 0 && token < args.vocabSize ? token : kNoToken;
        workspace.drafts[first + i] = draft;
    }
}

// Block (x, y) reduces chunk y of the row of draft x.
template <typename Type, int32_t kTop>
__global__ void __launch_bounds__(kThreads, entropy_gate::kBlocksPerSm<kTop>) reduceDraftRows(
    void const* __restrict__ logits, int64_t numRows, int32_t rowSize, int32_t vocabSize, int32_t numChunks,
    Draft const* __restrict__ drafts, ChunkResult<kTop>* __restrict__ results) {
    int64_t const draft = blockIdx.x;
    int64_t const row = drafts[draft].row;
    if (row < 0 || row >= numRows) return;  // left over where tensors contradict each other
    int32_t const chunk = static_cast<int32_t>(blockIdx.y);
    entropy_gate::reduceChunk(
        entropy_gate::Row<Type>(logits, row * rowSize, vocabSize), chunk, results[draft * numChunks + chunk]);
}

// One sequence's drafts under its policy.
struct Evidence {
    Draft* drafts;
    int64_t count;
    PackedLooseAcceptArgs const& args;

    __device__ __forceinline__ int64_t draftToken(int64_t position) const { return drafts[position].token; }
    __device__ __forceinline__ int64_t choice(int64_t position) const { return drafts[position].choice; }

    __device__ __forceinline__ bool isStop(int64_t token) const {
        for (int32_t i = 0; i < args.numStopTokens; ++i) {
            if (args.stopTokenIds[i] == token) return true;
        }
        return false;
    }

    // Whether the mismatch at `position` stands, given the next one's position.
    __device__ __forceinline__ bool isLoosened(
        int64_t position, int64_t nextMismatch, int64_t draft, int64_t target) const {
        if (!(drafts[position].gate >= args.entropyThreshold)) return false;  // nor where either is a NaN
        if (position + (args.window > args.lookahead ? args.window : args.lookahead) >= count) return false;
        if (nextMismatch <= position + args.lookahead) return false;
        if (draft == kNoToken || isStop(draft) || isStop(target)) return false;
        drafts[position].isLoosened = 1;
        return true;
    }
};

template <typename Type, int32_t kTop>
__device__ __forceinline__ void describe(
    Draft& draft, entropy_gate::MergedRow<kTop> const& row, PackedLooseAcceptArgs const& args) {
    float const maximum = row.top[0];
    float const raised = maximum + fmaxf(kLeastRaise, fabsf(maximum) * kRelativeRaise);
    float const gate = args.useFullEntropy != 0 ? row.entropy : row.entropyOfTop(args.topK);
    draft.choice = row.hasNan ? kNoChoice : static_cast<int32_t>(row.index);
    draft.gate = raised <= Type::kHighest ? gate : entropy_gate::notANumber();
    draft.raised = raised;
    draft.isLoosened = 0;
}

// One block per sequence: its warps merge its rows, then the first one decides and rewrites. Nothing after the first
// rejected position is rewritten; the runtime does not look there, and logits that nobody needs changed stay as they
// are.
template <typename Type, int32_t kTop>
__global__ void __launch_bounds__(kThreads) loosenRows(
    PackedLooseAcceptArgs args, Workspace workspace, int32_t numChunks) {
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    Sequence const sequence = workspace.sequences[blockIdx.x];
    if (sequence.count == 0) return;
    Draft* const drafts = workspace.drafts + sequence.first;
    auto const* const chunks = static_cast<ChunkResult<kTop> const*>(workspace.chunks) +
        static_cast<int64_t>(sequence.first) * numChunks;
    for (int32_t i = warp; i < sequence.count; i += kWarps) {
        auto const row = entropy_gate::mergeRow<Type>(chunks + static_cast<int64_t>(i) * numChunks, numChunks, lane);
        if (lane == 0) describe<Type>(drafts[i], row, args);
    }
    __syncthreads();
    if (warp != 0) return;

    Evidence const evidence{drafts, sequence.count, args};
    int64_t const rejected = loose_window_accept::firstRejected(evidence, 0, sequence.count, lane);
    __syncwarp();
    auto* const rewritten = static_cast<typename Type::Element*>(args.rewritten);
    for (int64_t i = lane; i < rejected; i += kWarpSize) {
        Draft const draft = drafts[i];
        if (draft.isLoosened == 0) continue;
        rewritten[static_cast<int64_t>(draft.row) * args.rowSize + draft.token] = entropy_gate::element<Type>(draft.raised);
    }
}

}  // namespace fly::packed_accept
