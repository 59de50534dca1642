// Checks the arguments of LooseWindowAccept and launches its kernel.

#include "loose_window_accept.h"

#include "loose_window_accept.cuh"

#include <climits>

namespace fly {
namespace {

bool isValid(LooseWindowAcceptArgs const& args) {
    return args.batchSize >= 0 && args.batchSize <= INT_MAX && args.numTokens >= 1 && args.numStopTokens >= 0 &&
        (args.stopTokenIds != nullptr || args.numStopTokens == 0) && args.nextTokens != nullptr &&
        args.argmax != nullptr && args.entropy != nullptr && args.entropyTopk != nullptr &&
        args.numContext != nullptr && args.numDraft != nullptr && args.entropyThreshold != nullptr &&
        args.useFullEntropy != nullptr && args.window != nullptr && args.lookahead != nullptr &&
        args.numAccepted != nullptr && args.nextToken != nullptr;
}

}  // namespace

cudaError_t launchLooseWindowAccept(LooseWindowAcceptArgs const& args, cudaStream_t stream) noexcept {
    if (args.batchSize == 0) return cudaSuccess;
    if (!isValid(args)) return cudaErrorInvalidValue;
    cudaLaunchConfig_t config{};
    config.stream = stream;
    config.gridDim = dim3(static_cast<uint32_t>(args.batchSize));
    config.blockDim = dim3(loose_window_accept::kWarpSize);
    return cudaLaunchKernelEx(&config, loose_window_accept::acceptRows, args);
}

}  // namespace fly
