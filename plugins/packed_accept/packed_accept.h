// PackedLooseAccept: raises the logits of draft tokens that FLy's rule loosens, so that a runtime which accepts a draft
// token iff it is the largest logit of its row accepts what the rule accepts.
//
// This is the launch interface, free of any TensorRT type. The rule is written out in fly_trt/verification/fly.py; the
// rows are those of a TensorRT-LLM 1.2 engine with DRAFT_TOKENS_EXTERNAL, see README.md.
#pragma once

#include "entropy_gate/entropy_gate.h"

namespace fly {

inline constexpr int32_t kMaxPackedStopTokens = 64;

struct PackedLooseAcceptArgs {
    void const* logits;  // [numRows, rowSize], dense; rows need no alignment beyond that of an element
    void* rewritten;     // the same shape and type; may be `logits` itself
    LogitsType logitsType;
    int64_t numRows;       // R
    int64_t numTokens;     // T
    int64_t numSequences;  // S
    int32_t rowSize;       // columns, padding included
    int32_t vocabSize;     // columns that are tokens, 1..min(rowSize, kMaxVocabSize)
    int32_t topK;          // 1..min(kMaxTopK, vocabSize), how many probabilities the gate's entropy is of
    int32_t const* lastTokenIds;    // [numRows], how many tokens of the step come up to a row's one, itself included
    int32_t const* inputIds;        // [numTokens]
    int32_t const* contextLengths;  // [numSequences], of a context request its tokens in this step, drafts included
    float entropyThreshold;         // nats; +inf means exact match
    int32_t useFullEntropy;         // the threshold is for the entropy of the whole vocabulary
    int32_t window;                 // at least 0
    int32_t lookahead;              // at least 0
    int32_t numStopTokens;          // 0..kMaxPackedStopTokens
    int32_t stopTokenIds[kMaxPackedStopTokens];  // tokens that are never loosened; -1 = none
};

// Bytes of workspace that suffice for any number of rows up to maxNumRows, however many sequences they belong to, for
// logits of any type; 0 if an argument is out of range.
size_t packedLooseAcceptWorkspaceBytes(int64_t maxNumRows, int32_t vocabSize, int32_t topK) noexcept;

// Enqueues the computation. `workspace` is aligned to 256 bytes; its content is neither expected nor kept. Nothing is
// allocated, nothing waits and nothing but the shapes is read on the host, so the launch can be captured into a CUDA
// graph that is replayed on other values. Invalid arguments are refused with cudaErrorInvalidValue before anything is
// enqueued. Whatever the device tensors say, reads and writes stay inside them.
cudaError_t launchPackedLooseAccept(
    PackedLooseAcceptArgs const& args, void* workspace, size_t workspaceBytes, cudaStream_t stream) noexcept;

}  // namespace fly
