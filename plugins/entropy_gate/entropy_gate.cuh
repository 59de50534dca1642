// The kernels of EntropyGate: one block for each chunk of a row, then one warp for each row.
#pragma once

#include "row_reduction.cuh"

namespace fly::entropy_gate {

inline constexpr int32_t kRowsPerMergeBlock = kThreads / kWarpSize;

// Block (x, y) reduces chunk y of row x.
template <typename Type, int32_t kTop>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kTop>) reduceChunks(
    void const* __restrict__ logits, int32_t vocabSize, int32_t numChunks, ChunkResult<kTop>* __restrict__ results) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    // The merge may start as soon as the last blocks run; it waits there for this grid's results.
    cudaTriggerProgrammaticLaunchCompletion();
#endif
    int64_t const row = blockIdx.x;
    int32_t const chunk = static_cast<int32_t>(blockIdx.y);
    reduceChunk(Row<Type>(logits, row * vocabSize, vocabSize), chunk, results[row * numChunks + chunk]);
}

struct MergeArgs {
    void const* logits;
    int64_t const* nextTokens;
    int64_t* argmax;
    float* entropy;
    float* entropyTopk;
    float* argmaxLogprob;
    float* tokenLogprob;
    int64_t* topIds;
    float* topLogprobs;
    int32_t numRows;
    int32_t vocabSize;
    int32_t numChunks;
    int32_t topK;
};

// One warp per row.
template <typename Type, int32_t kTop>
__global__ void __launch_bounds__(kThreads) mergeChunks(MergeArgs args, ChunkResult<kTop> const* results) {
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const row =
        static_cast<int32_t>(blockIdx.x) * kRowsPerMergeBlock + static_cast<int32_t>(threadIdx.x) / kWarpSize;
    if (row >= args.numRows) return;
    // Neither of these comes from reduceChunks, so they are on their way before its results are waited for.
    int64_t const token = args.nextTokens[row];
    float tokenLogit = notANumber();
    if (token >= 0 && token < args.vocabSize) {
        int64_t const first = static_cast<int64_t>(row) * args.vocabSize;
        tokenLogit = Row<Type>(args.logits, first, args.vocabSize).valueNow(token);
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    MergedRow<kTop> const merged =
        mergeRow<Type>(results + static_cast<int64_t>(row) * args.numChunks, args.numChunks, lane);
    if (lane != 0) return;

    int64_t const firstTop = static_cast<int64_t>(row) * args.topK;
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) {
        if (i >= args.topK) continue;
        // Behind the row's end only where there is no softmax, and then any token is as good.
        bool const isToken = merged.places[i] < static_cast<uint32_t>(args.vocabSize);
        args.topIds[firstTop + i] = isToken ? static_cast<int64_t>(merged.places[i]) : 0;
        args.topLogprobs[firstTop + i] = merged.logProbability(i);
    }
    args.argmax[row] = static_cast<int64_t>(merged.index);
    args.entropy[row] = merged.entropy;
    args.entropyTopk[row] = merged.entropyOfTop(args.topK);
    args.argmaxLogprob[row] = -merged.logNorm;
    args.tokenLogprob[row] = tokenLogit - merged.top[0] - merged.logNorm;
}

}  // namespace fly::entropy_gate
