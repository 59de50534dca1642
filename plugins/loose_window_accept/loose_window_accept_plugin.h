// LooseWindowAccept as a TensorRT plugin: per-position outputs of EntropyGate and per-row policy in, the number of
// accepted draft tokens and the token after them out. The rule and its kernel are in loose_window_accept.h; here is
// only what TensorRT needs to know.
#pragma once

#include "common/plugin.h"

namespace fly {

Signature const& looseWindowAcceptSignature();

class LooseWindowAcceptPlugin final : public Plugin {
public:
    explicit LooseWindowAcceptPlugin(nvinfer1::PluginFieldCollection const* fields);

private:
    std::unique_ptr<Plugin> copy() const override;
    void checkSize(TensorSpec const& tensor, char letter, int64_t size) const override;
    cudaError_t launch(Call const& call) const override;
};

}  // namespace fly
