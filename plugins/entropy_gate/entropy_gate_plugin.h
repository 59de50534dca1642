// EntropyGate as a TensorRT plugin: logits and the token that follows each position in, argmax, two entropies, two
// log probabilities and the most probable tokens per position out. The kernels and the meaning of every number are in entropy_gate.h; here is only
// what TensorRT needs to know.
#pragma once

#include "common/plugin.h"
#include "entropy_gate/entropy_gate.h"

namespace fly {

Signature const& entropyGateSignature();

// Of one of the three types that signatures let logits have.
LogitsType logitsTypeOf(nvinfer1::DataType type);

class EntropyGatePlugin final : public Plugin {
public:
    explicit EntropyGatePlugin(nvinfer1::PluginFieldCollection const* fields);

private:
    std::unique_ptr<Plugin> copy() const override;
    void checkSize(TensorSpec const& tensor, char letter, int64_t size) const override;
    size_t workspaceBytes(Sizes const& largest) const override;
    cudaError_t launch(Call const& call) const override;

    int32_t topK() const {
        return integer(0);
    }
};

}  // namespace fly
