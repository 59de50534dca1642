// LooseWindowAccept: how many draft tokens of each row stand under FLy's rule, and which token follows them.
//
// This is the launch interface, free of any TensorRT type. The rule is written out in fly_trt/verification/fly.py; the
// layout of a row is that of the engines' verification head: position t predicts token t + 1, and the draft tokens of a
// row are predicted at positions numContext - 1 onwards.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fly {

struct LooseWindowAcceptArgs {
    int64_t batchSize;
    int64_t numTokens;  // T, tokens per row
    int64_t numStopTokens;
    int64_t const* nextTokens;      // [B, T], the input token that follows each position
    int64_t const* argmax;          // [B, T], the target's choice at each position
    float const* entropy;           // [B, T], nats; a NaN never loosens
    float const* entropyTopk;       // [B, T], nats
    int64_t const* numContext;      // [B]
    int64_t const* numDraft;        // [B]
    float const* entropyThreshold;  // [B], nats
    int32_t const* useFullEntropy;  // [B], which of the two entropies the threshold is for
    int64_t const* window;          // [B]
    int64_t const* lookahead;       // [B]
    int64_t const* stopTokenIds;    // [N], tokens that are never loosened; -1 = none
    int64_t* numAccepted;           // [B]
    int64_t* nextToken;             // [B]
};

// Enqueues the computation. Nothing is allocated and nothing waits, so the launch can be captured into a CUDA graph.
// Whatever the row's parameters say, reads stay inside the row: positions outside 0..T-1 are not draft positions, and
// the index of next_token is bounded, -1 meaning the last position as in ONNX.
cudaError_t launchLooseWindowAccept(LooseWindowAcceptArgs const& args, cudaStream_t stream) noexcept;

}  // namespace fly
