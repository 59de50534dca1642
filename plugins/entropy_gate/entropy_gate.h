// EntropyGate: what the verification of a draft needs to know of each row of logits, in one pass over the vocabulary.
//
// This is the launch interface, free of any TensorRT type. Everything is row-wise: the bits of a row's results depend
// on the row, the vocabulary size and the type of the logits, never on the number of rows or on the row's place among
// them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace fly {

enum class LogitsType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

inline constexpr int32_t kMaxTopK = 8;
inline constexpr int32_t kMaxVocabSize = 1 << 27;

struct EntropyGateArgs {
    void const* logits;  // [numRows, vocabSize], dense; rows need no alignment beyond that of an element
    LogitsType logitsType;
    int64_t numRows;            // batch size * tokens per sequence
    int32_t vocabSize;          // 1..kMaxVocabSize
    int32_t topK;               // 1..min(kMaxTopK, vocabSize), how many probabilities entropyTopk is of, and topIds lists
    int64_t const* nextTokens;  // [numRows], the token whose log probability is asked for; NaN where it is not a token
    int64_t* argmax;            // [numRows], the first index of the maximum; of a row with NaN the first NaN's index
    float* entropy;             // [numRows], of the softmax over the whole vocabulary, in nats
    float* entropyTopk;         // [numRows], the same sum over the topK largest probabilities, not renormalised
    float* argmaxLogprob;       // [numRows], nats
    float* tokenLogprob;        // [numRows], nats
    int64_t* topIds;            // [numRows, topK], the most probable tokens, the lowest first among equals
    float* topLogprobs;         // [numRows, topK], theirs, nats; -inf where the logit is
};
// Logits of -inf contribute nothing. A row that holds a NaN or +inf, or nothing but -inf, has no softmax: its float
// results are NaN, so that no threshold is ever reached and the host can report it, and its topIds are any tokens. So are those of a row whose
// maximum cannot be told from values that mask logits (below -6e4 for float16, -5e8 otherwise) or exceeds 5e8: up to
// there the results are within 1e-3 relative or 1e-5 absolute of the exact ones, beyond float32 would lose them.

// Bytes of workspace that suffice for any number of rows up to maxNumRows, for logits of any type; 0 if an argument
// is out of range.
size_t entropyGateWorkspaceBytes(int64_t maxNumRows, int32_t vocabSize, int32_t topK) noexcept;

// Enqueues the computation. `workspace` is aligned to 256 bytes; its content is neither expected nor kept. Nothing is
// allocated and nothing waits, so the launch can be captured into a CUDA graph. Invalid arguments are refused with
// cudaErrorInvalidValue before anything is enqueued.
cudaError_t launchEntropyGate(
    EntropyGateArgs const& args, void* workspace, size_t workspaceBytes, cudaStream_t stream) noexcept;

}  // namespace fly
