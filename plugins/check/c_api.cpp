// The launch functions for Python's ctypes, which plugins/check/kernels.py builds them for: with nvcc for a GPU, with
// a C++ compiler for a CPU. Returns are those of the launch functions.

#include "entropy_gate/entropy_gate.h"
#include "loose_window_accept/loose_window_accept.h"
#include "packed_accept/packed_accept.h"

extern "C" {

size_t flyEntropyGateWorkspaceBytes(int64_t maxNumRows, int32_t vocabSize, int32_t topK) {
    return fly::entropyGateWorkspaceBytes(maxNumRows, vocabSize, topK);
}

int32_t flyEntropyGate(fly::EntropyGateArgs const* args, void* workspace, size_t workspaceBytes, void* stream) {
    return fly::launchEntropyGate(*args, workspace, workspaceBytes, static_cast<cudaStream_t>(stream));
}

int32_t flyLooseWindowAccept(fly::LooseWindowAcceptArgs const* args, void* stream) {
    return fly::launchLooseWindowAccept(*args, static_cast<cudaStream_t>(stream));
}

size_t flyPackedLooseAcceptWorkspaceBytes(int64_t maxNumRows, int32_t vocabSize, int32_t topK) {
    return fly::packedLooseAcceptWorkspaceBytes(maxNumRows, vocabSize, topK);
}

int32_t flyPackedLooseAccept(
    fly::PackedLooseAcceptArgs const* args, void* workspace, size_t workspaceBytes, void* stream) {
    return fly::launchPackedLooseAccept(*args, workspace, workspaceBytes, static_cast<cudaStream_t>(stream));
}

#ifdef FLY_ON_CPU
// Loads of logits outside [begin, begin + numBytes) end the process from here on.
void flyWatchLoads(void const* begin, size_t numBytes) { watchLoads(begin, numBytes); }
#endif
}
