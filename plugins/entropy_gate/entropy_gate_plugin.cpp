// See entropy_gate_plugin.h.
#include "entropy_gate/entropy_gate_plugin.h"

#include "common/log.h"

namespace fly {
namespace {

using nvinfer1::DataType;

constexpr int32_t kDefaultTopK = 3;

}  // namespace

LogitsType logitsTypeOf(DataType type) {
    switch (type) {
    case DataType::kHALF: return LogitsType::kFloat16;
    case DataType::kBF16: return LogitsType::kBfloat16;
    default: return LogitsType::kFloat32;
    }
}

Signature const& entropyGateSignature() {
    static Signature const signature{
        "EntropyGate",
        {
            {"logits", {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}, "BTV"},
            {"next_tokens", {DataType::kINT64}, "BT"},
        },
        {
            {"argmax", {DataType::kINT64}, "BT"},
            {"entropy", {DataType::kFLOAT}, "BT"},
            {"entropy_topk", {DataType::kFLOAT}, "BT"},
            {"argmax_logprob", {DataType::kFLOAT}, "BT"},
            {"token_logprob", {DataType::kFLOAT}, "BT"},
            {"top_ids", {DataType::kINT64}, "BTK"},
            {"top_logprobs", {DataType::kFLOAT}, "BTK"},
        },
        {{"top_k", FieldKind::kInteger, kDefaultTopK, 1, kMaxTopK, 1, 'K'}},
    };
    return signature;
}

EntropyGatePlugin::EntropyGatePlugin(nvinfer1::PluginFieldCollection const* fields)
    : Plugin(entropyGateSignature(), fields) {}

std::unique_ptr<Plugin> EntropyGatePlugin::copy() const {
    return std::make_unique<EntropyGatePlugin>(*this);
}

void EntropyGatePlugin::checkSize(TensorSpec const& tensor, char letter, int64_t size) const {
    if (letter == 'V' && (size < topK() || size > kMaxVocabSize)) {
        fail(tensor.name, " has a vocabulary of ", size, ", expected at least top_k = ", topK(), " and at most ",
            kMaxVocabSize, ": lower top_k or check the order of the dimensions [B, T, V]");
    }
}

size_t EntropyGatePlugin::workspaceBytes(Sizes const& largest) const {
    return entropyGateWorkspaceBytes(largest['B'] * largest['T'], static_cast<int32_t>(largest['V']), topK());
}

cudaError_t EntropyGatePlugin::launch(Call const& call) const {
    EntropyGateArgs args{};
    args.logits = call.input<void>(0);
    args.logitsType = logitsTypeOf(call.inputDesc[0].type);
    args.numRows = call.sizes['B'] * call.sizes['T'];
    args.vocabSize = static_cast<int32_t>(call.sizes['V']);
    args.topK = topK();
    args.nextTokens = call.input<int64_t>(1);
    args.argmax = call.output<int64_t>(0);
    args.entropy = call.output<float>(1);
    args.entropyTopk = call.output<float>(2);
    args.argmaxLogprob = call.output<float>(3);
    args.tokenLogprob = call.output<float>(4);
    args.topIds = call.output<int64_t>(5);
    args.topLogprobs = call.output<float>(6);
    // The size for this call, not the size that was allocated for the largest one, which is never less.
    return launchEntropyGate(args, call.workspace, workspaceBytes(call.sizes), call.stream);
}

}  // namespace fly
