// See packed_accept_plugin.h.
#include "packed_accept/packed_accept_plugin.h"

#include "common/log.h"
#include "entropy_gate/entropy_gate_plugin.h"
#include "packed_accept/packed_accept.h"

#include <algorithm>
#include <limits>

namespace fly {

using nvinfer1::DataType;

namespace {

constexpr int32_t kMaxWindow = 1 << 30;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
// In the order of the signature.
enum FieldIndex : size_t { kThreshold, kUseFullEntropy, kTopK, kWindow, kLookahead, kVocabSize, kStopTokenIds };

}  // namespace

Signature const& packedLooseAcceptSignature() {
    static Signature const signature{
        "PackedLooseAccept",
        {
            {"logits", {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}, "RV"},
            {"last_token_ids", {DataType::kINT32}, "R"},
            {"input_ids", {DataType::kINT32}, "T"},
            {"context_lengths", {DataType::kINT32}, "S"},
        },
        {{"rewritten", {}, "RV"}},
        {
            {"entropy_threshold", FieldKind::kReal, 0.3, 0, kInfinity},
            {"use_full_entropy", FieldKind::kInteger, 0, 0, 1},
            {"entropy_top_k", FieldKind::kInteger, 3, 1, kMaxTopK},
            {"window", FieldKind::kInteger, 6, 0, kMaxWindow},
            {"lookahead", FieldKind::kInteger, 5, 0, kMaxWindow},
            {"vocab_size", FieldKind::kInteger, 0, 0, kMaxVocabSize},
            {"stop_token_ids", FieldKind::kIntegers, -1, -1, std::numeric_limits<int32_t>::max(), kMaxPackedStopTokens},
        },
    };
    return signature;
}

PackedLooseAcceptPlugin::PackedLooseAcceptPlugin(nvinfer1::PluginFieldCollection const* fields)
    : Plugin(packedLooseAcceptSignature(), fields) {
    if (integer(kVocabSize) != 0 && integer(kVocabSize) < integer(kTopK)) {
        fail("entropy_top_k is ", integer(kTopK), ", expected at most vocab_size = ", integer(kVocabSize),
            ": lower entropy_top_k");
    }
}

std::unique_ptr<Plugin> PackedLooseAcceptPlugin::copy() const {
    return std::make_unique<PackedLooseAcceptPlugin>(*this);
}

int32_t PackedLooseAcceptPlugin::vocabSizeOf(int64_t rowSize) const {
    return integer(kVocabSize) == 0 ? static_cast<int32_t>(rowSize) : integer(kVocabSize);
}

void PackedLooseAcceptPlugin::checkSize(TensorSpec const& tensor, char letter, int64_t size) const {
    int32_t const least = std::max(integer(kVocabSize), integer(kTopK));
    if (letter == 'V' && (size < least || size > kMaxVocabSize)) {
        fail(tensor.name, " has rows of ", size, ", expected at least ", least, " and at most ", kMaxVocabSize,
            ": they hold vocab_size and entropy_top_k columns; check the order of the dimensions [R, V]");
    }
}

size_t PackedLooseAcceptPlugin::workspaceBytes(Sizes const& largest) const {
    return packedLooseAcceptWorkspaceBytes(largest['R'], vocabSizeOf(largest['V']), integer(kTopK));
}

cudaError_t PackedLooseAcceptPlugin::launch(Call const& call) const {
    PackedLooseAcceptArgs args{};
    args.logits = call.input<void>(0);
    args.rewritten = call.output<void>(0);
    args.logitsType = logitsTypeOf(call.inputDesc[0].type);
    args.numRows = call.sizes['R'];
    args.numTokens = call.sizes['T'];
    args.numSequences = call.sizes['S'];
    args.rowSize = static_cast<int32_t>(call.sizes['V']);
    args.vocabSize = vocabSizeOf(call.sizes['V']);
    args.topK = integer(kTopK);
    args.lastTokenIds = call.input<int32_t>(1);
    args.inputIds = call.input<int32_t>(2);
    args.contextLengths = call.input<int32_t>(3);
    args.entropyThreshold = real(kThreshold);
    args.useFullEntropy = integer(kUseFullEntropy);
    args.window = integer(kWindow);
    args.lookahead = integer(kLookahead);
    args.numStopTokens = static_cast<int32_t>(integers(kStopTokenIds).size());
    std::copy(integers(kStopTokenIds).begin(), integers(kStopTokenIds).end(), args.stopTokenIds);
    return launchPackedLooseAccept(args, call.workspace, workspaceBytes(call.sizes), call.stream);
}

}  // namespace fly
