// See loose_window_accept_plugin.h.
#include "loose_window_accept/loose_window_accept_plugin.h"

#include "common/log.h"
#include "loose_window_accept/loose_window_accept.h"

namespace fly {

using nvinfer1::DataType;

Signature const& looseWindowAcceptSignature() {
    static Signature const signature{
        "LooseWindowAccept",
        {
            {"next_tokens", {DataType::kINT64}, "BT"},
            {"argmax", {DataType::kINT64}, "BT"},
            {"entropy", {DataType::kFLOAT}, "BT"},
            {"entropy_topk", {DataType::kFLOAT}, "BT"},
            {"num_context", {DataType::kINT64}, "B"},
            {"num_draft", {DataType::kINT64}, "B"},
            {"entropy_threshold", {DataType::kFLOAT}, "B"},
            {"use_full_entropy", {DataType::kINT32}, "B"},
            {"window", {DataType::kINT64}, "B"},
            {"lookahead", {DataType::kINT64}, "B"},
            {"stop_token_ids", {DataType::kINT64}, "N"},
        },
        {
            {"num_accepted", {DataType::kINT64}, "B"},
            {"next_token", {DataType::kINT64}, "B"},
        },
        {},
    };
    return signature;
}

LooseWindowAcceptPlugin::LooseWindowAcceptPlugin(nvinfer1::PluginFieldCollection const* fields)
    : Plugin(looseWindowAcceptSignature(), fields) {}

std::unique_ptr<Plugin> LooseWindowAcceptPlugin::copy() const {
    return std::make_unique<LooseWindowAcceptPlugin>(*this);
}

void LooseWindowAcceptPlugin::checkSize(TensorSpec const& tensor, char letter, int64_t size) const {
    if (letter == 'T' && size < 1) {
        fail(tensor.name, " has ", size, " positions, expected at least 1: every row holds a context token");
    }
}

cudaError_t LooseWindowAcceptPlugin::launch(Call const& call) const {
    LooseWindowAcceptArgs args{};
    args.batchSize = call.sizes['B'];
    args.numTokens = call.sizes['T'];
    args.numStopTokens = call.sizes['N'];
    args.nextTokens = call.input<int64_t>(0);
    args.argmax = call.input<int64_t>(1);
    args.entropy = call.input<float>(2);
    args.entropyTopk = call.input<float>(3);
    args.numContext = call.input<int64_t>(4);
    args.numDraft = call.input<int64_t>(5);
    args.entropyThreshold = call.input<float>(6);
    args.useFullEntropy = call.input<int32_t>(7);
    args.window = call.input<int64_t>(8);
    args.lookahead = call.input<int64_t>(9);
    args.stopTokenIds = call.input<int64_t>(10);
    args.numAccepted = call.output<int64_t>(0);
    args.nextToken = call.output<int64_t>(1);
    return launchLooseWindowAccept(args, call.stream);
}

}  // namespace fly
