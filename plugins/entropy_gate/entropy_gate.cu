// Checks the arguments of EntropyGate, shares out the workspace and launches the two kernels.

#include "entropy_gate.h"

#include "entropy_gate.cuh"

#include <climits>

namespace fly {
namespace {

using namespace entropy_gate;

size_t chunkResultBytes(int32_t topK) {
    return topK <= kShortTop ? sizeof(ChunkResult<kShortTop>) : sizeof(ChunkResult<kMaxTopK>);
}

bool isValid(EntropyGateArgs const& args) {
    bool const knownType = args.logitsType == LogitsType::kFloat32 || args.logitsType == LogitsType::kFloat16 ||
        args.logitsType == LogitsType::kBfloat16;
    return knownType && args.vocabSize >= 1 && args.vocabSize <= kMaxVocabSize && args.topK >= 1 &&
        args.topK <= kMaxTopK && args.topK <= args.vocabSize && args.logits != nullptr && args.nextTokens != nullptr &&
        args.argmax != nullptr && args.entropy != nullptr && args.entropyTopk != nullptr &&
        args.argmaxLogprob != nullptr && args.tokenLogprob != nullptr && args.topIds != nullptr &&
        args.topLogprobs != nullptr;
}

// A second kernel merges the chunks, because the workspace comes with undefined content: a counter for "the last
// block merges" would need a launch of its own to be set. Where it can, the merge starts while the last chunks are
// still reduced and waits on the device, which hides its launch. Code compiled for architectures before sm_90 does
// not have that wait, whatever device it runs on.
template <typename Kernel>
cudaError_t overlapsWithPredecessor(Kernel* kernel, bool& overlaps) {
    cudaFuncAttributes attributes{};
    cudaError_t const error = cudaFuncGetAttributes(&attributes, kernel);
    overlaps = error == cudaSuccess && attributes.ptxVersion >= 90;
    return error;
}

template <typename Type, int32_t kTop>
cudaError_t launch(EntropyGateArgs const& args, void* workspace, size_t workspaceBytes, cudaStream_t stream) {
    int32_t const numChunks = numChunksOf<Type>(args.vocabSize);
    if (args.numRows > INT_MAX - kRowsPerMergeBlock) return cudaErrorInvalidValue;
    int32_t const numRows = static_cast<int32_t>(args.numRows);
    size_t const needed = sizeof(ChunkResult<kTop>) * static_cast<size_t>(numRows) * static_cast<size_t>(numChunks);
    if (workspace == nullptr || workspaceBytes < needed) return cudaErrorInvalidValue;
    if (reinterpret_cast<uintptr_t>(workspace) % alignof(ChunkResult<kTop>) != 0) return cudaErrorInvalidValue;
    if (reinterpret_cast<uintptr_t>(args.logits) % sizeof(typename Type::Element) != 0) return cudaErrorInvalidValue;
    auto* const results = static_cast<ChunkResult<kTop>*>(workspace);

    bool overlaps = false;
    cudaError_t error = overlapsWithPredecessor(mergeChunks<Type, kTop>, overlaps);
    if (error != cudaSuccess) return error;

    cudaLaunchConfig_t config{};
    config.stream = stream;
    config.blockDim = dim3(kThreads);
    // In this order, because the second dimension is the smaller one: kMaxVocabSize keeps the chunks within it.
    config.gridDim = dim3(static_cast<uint32_t>(numRows), static_cast<uint32_t>(numChunks));
    error = cudaLaunchKernelEx(&config, reduceChunks<Type, kTop>, args.logits, args.vocabSize, numChunks, results);
    if (error != cudaSuccess) return error;

    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = overlaps ? 1 : 0;
    config.gridDim = dim3(static_cast<uint32_t>(divideUp(numRows, kRowsPerMergeBlock)));
    MergeArgs const mergeArgs{args.logits, args.nextTokens, args.argmax, args.entropy, args.entropyTopk,
        args.argmaxLogprob, args.tokenLogprob, args.topIds, args.topLogprobs, numRows, args.vocabSize, numChunks,
        args.topK};
    ChunkResult<kTop> const* const finished = results;
    return cudaLaunchKernelEx(&config, mergeChunks<Type, kTop>, mergeArgs, finished);
}

template <typename Type>
cudaError_t launchTop(EntropyGateArgs const& args, void* workspace, size_t workspaceBytes, cudaStream_t stream) {
    return args.topK <= kShortTop ? launch<Type, kShortTop>(args, workspace, workspaceBytes, stream)
                                  : launch<Type, kMaxTopK>(args, workspace, workspaceBytes, stream);
}

}  // namespace

size_t entropyGateWorkspaceBytes(int64_t maxNumRows, int32_t vocabSize, int32_t topK) noexcept {
    if (maxNumRows < 1 || vocabSize < 1 || vocabSize > kMaxVocabSize || topK < 1 || topK > kMaxTopK) return 0;
    // The widest type has the most chunks.
    return chunkResultBytes(topK) * static_cast<size_t>(maxNumRows) *
        static_cast<size_t>(numChunksOf<Float32>(vocabSize));
}

cudaError_t launchEntropyGate(
    EntropyGateArgs const& args, void* workspace, size_t workspaceBytes, cudaStream_t stream) noexcept {
    if (args.numRows == 0) return cudaSuccess;
    if (args.numRows < 0 || !isValid(args)) return cudaErrorInvalidValue;
    switch (args.logitsType) {
    case LogitsType::kFloat32: return launchTop<Float32>(args, workspace, workspaceBytes, stream);
    case LogitsType::kFloat16: return launchTop<Float16>(args, workspace, workspaceBytes, stream);
    case LogitsType::kBfloat16: return launchTop<Bfloat16>(args, workspace, workspaceBytes, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace fly
