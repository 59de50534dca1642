// Checks the arguments of PackedLooseAccept, copies the logits, shares out the workspace and launches the kernels.

#include "packed_accept.h"

#include "packed_accept.cuh"

#include <climits>

namespace fly {
namespace {

using namespace packed_accept;
using entropy_gate::Bfloat16;
using entropy_gate::Float16;
using entropy_gate::Float32;
using entropy_gate::kShortTop;

constexpr size_t kAlignment = 256;

int64_t divideUp(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

size_t aligned(size_t numBytes) { return (numBytes + kAlignment - 1) / kAlignment * kAlignment; }

bool isValid(PackedLooseAcceptArgs const& args) {
    bool const knownType = args.logitsType == LogitsType::kFloat32 || args.logitsType == LogitsType::kFloat16 ||
        args.logitsType == LogitsType::kBfloat16;
    bool const knownSizes = args.numRows >= 0 && args.numTokens >= 0 && args.numSequences >= 0 &&
        args.numRows <= INT_MAX && args.numTokens <= INT_MAX && args.numSequences <= INT_MAX && args.vocabSize >= 1 &&
        args.vocabSize <= args.rowSize && args.vocabSize <= kMaxVocabSize;
    bool const knownPolicy = args.topK >= 1 && args.topK <= kMaxTopK && args.topK <= args.vocabSize &&
        args.window >= 0 && args.lookahead >= 0 && args.numStopTokens >= 0 &&
        args.numStopTokens <= kMaxPackedStopTokens;
    return knownType && knownSizes && knownPolicy && args.logits != nullptr && args.rewritten != nullptr &&
        args.lastTokenIds != nullptr && args.inputIds != nullptr && args.contextLengths != nullptr;
}

// Where everything is in the workspace for this many rows, with as many sequences and drafts as there can be; `size`
// is what it takes.
Workspace shareOut(void* workspace, int64_t numRows, size_t& size) {
    auto* const begin = static_cast<char*>(workspace);
    size_t const draftsAt = aligned(sizeof(Sequence) * static_cast<size_t>(numRows));
    size = draftsAt + aligned(sizeof(Draft) * static_cast<size_t>(numRows));
    return {reinterpret_cast<Sequence*>(begin), reinterpret_cast<Draft*>(begin + draftsAt), begin + size};
}

template <typename Type, int32_t kTop>
cudaError_t launch(PackedLooseAcceptArgs const& args, void* memory, size_t memoryBytes, cudaStream_t stream) {
    using Element = typename Type::Element;
    size_t const logitsBytes = sizeof(Element) * static_cast<size_t>(args.numRows) * static_cast<size_t>(args.rowSize);
    auto const isAligned = [](void const* logits) { return reinterpret_cast<uintptr_t>(logits) % sizeof(Element) == 0; };
    if (!isAligned(args.logits) || !isAligned(args.rewritten)) return cudaErrorInvalidValue;
    size_t smallBytes = 0;
    Workspace const workspace = shareOut(memory, args.numRows, smallBytes);
    int32_t const numChunks = entropy_gate::numChunksOf<Type>(args.vocabSize);
    int64_t const numDrafts = args.numRows - args.numSequences;
    size_t const chunkBytes = sizeof(ChunkResult<kTop>) * static_cast<size_t>(args.numRows) *
        static_cast<size_t>(numChunks);
    if (memory == nullptr || memoryBytes < smallBytes + chunkBytes) return cudaErrorInvalidValue;
    if (reinterpret_cast<uintptr_t>(memory) % kAlignment != 0) return cudaErrorInvalidValue;

    if (args.rewritten != args.logits) {
        cudaError_t const error =
            cudaMemcpyAsync(args.rewritten, args.logits, logitsBytes, cudaMemcpyDeviceToDevice, stream);
        if (error != cudaSuccess) return error;
    }
    // Steps of generation requests alone have no drafts; other shapes are none of a step, but those that a builder
    // tries out.
    if (numDrafts <= 0 || args.numSequences == 0 || args.numTokens < args.numRows) return cudaSuccess;

    cudaLaunchConfig_t config{};
    config.stream = stream;
    config.blockDim = dim3(kThreads);
    config.gridDim = dim3(static_cast<uint32_t>(divideUp(args.numSequences, kWarps)));
    cudaError_t error = cudaLaunchKernelEx(&config, findDrafts, args, workspace);
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(static_cast<uint32_t>(numDrafts), static_cast<uint32_t>(numChunks));
    Draft const* const drafts = workspace.drafts;
    error = cudaLaunchKernelEx(&config, reduceDraftRows<Type, kTop>, args.logits, args.numRows, args.rowSize,
        args.vocabSize, numChunks, drafts, static_cast<ChunkResult<kTop>*>(workspace.chunks));
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(static_cast<uint32_t>(args.numSequences));
    return cudaLaunchKernelEx(&config, loosenRows<Type, kTop>, args, workspace, numChunks);
}

template <typename Type>
cudaError_t launchTop(PackedLooseAcceptArgs const& args, void* memory, size_t memoryBytes, cudaStream_t stream) {
    return args.topK <= kShortTop ? launch<Type, kShortTop>(args, memory, memoryBytes, stream)
                                  : launch<Type, kMaxTopK>(args, memory, memoryBytes, stream);
}

}  // namespace

size_t packedLooseAcceptWorkspaceBytes(int64_t maxNumRows, int32_t vocabSize, int32_t topK) noexcept {
    size_t const chunkBytes = entropyGateWorkspaceBytes(maxNumRows, vocabSize, topK);
    if (chunkBytes == 0) return 0;
    size_t smallBytes = 0;
    shareOut(nullptr, maxNumRows, smallBytes);
    return smallBytes + chunkBytes;
}

cudaError_t launchPackedLooseAccept(
    PackedLooseAcceptArgs const& args, void* workspace, size_t workspaceBytes, cudaStream_t stream) noexcept {
    if (args.numRows == 0) return cudaSuccess;
    if (!isValid(args)) return cudaErrorInvalidValue;
    switch (args.logitsType) {
    case LogitsType::kFloat32: return launchTop<Float32>(args, workspace, workspaceBytes, stream);
    case LogitsType::kFloat16: return launchTop<Float16>(args, workspace, workspaceBytes, stream);
    case LogitsType::kBfloat16: return launchTop<Bfloat16>(args, workspace, workspaceBytes, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace fly
