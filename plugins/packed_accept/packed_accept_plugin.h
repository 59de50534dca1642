// PackedLooseAccept as a TensorRT plugin: the packed rows of logits of a TensorRT-LLM step in, the same rows out with
// the loosened draft tokens raised. The kernels and the meaning of every tensor are in packed_accept.h; here is only
// what TensorRT needs to know.
#pragma once

#include "common/plugin.h"

namespace fly {

Signature const& packedLooseAcceptSignature();

class PackedLooseAcceptPlugin final : public Plugin {
public:
    explicit PackedLooseAcceptPlugin(nvinfer1::PluginFieldCollection const* fields);

private:
    std::unique_ptr<Plugin> copy() const override;
    void checkSize(TensorSpec const& tensor, char letter, int64_t size) const override;
    size_t workspaceBytes(Sizes const& largest) const override;
    cudaError_t launch(Call const& call) const override;

    // Columns that are tokens, of `rowSize` in all.
    int32_t vocabSizeOf(int64_t rowSize) const;
};

}  // namespace fly
