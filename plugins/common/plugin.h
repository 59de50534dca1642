// The part of a TensorRT plugin that follows from its signature: capabilities, types, formats, shapes, fields,
// serialisation, cloning and the guard around every noexcept method. A plugin derives from Plugin, says what it
// launches, and is made by a Creator. Nothing here links to TensorRT: the interfaces are header-only, so one library
// loads into every version whose interfaces it was compiled for.
#pragma once

#include "common/signature.h"

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <vector>

namespace fly {

// One execution: sizes by letter, and device pointers in the order of the signature.
struct Call {
    Sizes sizes;
    nvinfer1::PluginTensorDesc const* inputDesc;
    void const* const* inputs;
    void* const* outputs;
    void* workspace;
    cudaStream_t stream;

    template <typename T>
    T const* input(int32_t index) const {
        return static_cast<T const*>(inputs[index]);
    }
    template <typename T>
    T* output(int32_t index) const {
        return static_cast<T*>(outputs[index]);
    }
};

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    Plugin(Signature const& signature, nvinfer1::PluginFieldCollection const* fields);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;
    nvinfer1::IPluginV3* clone() noexcept final;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept final;
    char const* getPluginVersion() const noexcept final;
    char const* getPluginNamespace() const noexcept final;

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept final;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept final;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept final;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept final;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept final;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept final;
    char const* getTimingCacheID() noexcept final;
    char const* getMetadataString() noexcept final;

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept final;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept final;

protected:
    // Not the default one: the serialised fields point at the values of their own plugin.
    Plugin(Plugin const& other);

    int32_t integer(size_t field) const {
        return mFieldValues[field].integers.front();
    }
    std::vector<int32_t> const& integers(size_t field) const {
        return mFieldValues[field].integers;
    }
    float real(size_t field) const {
        return mFieldValues[field].real;
    }

private:
    Plugin(Signature const& signature, std::vector<FieldValue> fieldValues);

    virtual std::unique_ptr<Plugin> copy() const = 0;
    // Throws when an input's dimension cannot have this size; called whenever one is known, in building and execution.
    virtual void checkSize(TensorSpec const& tensor, char letter, int64_t size) const = 0;
    // Device memory that a call of these sizes or smaller ones needs.
    virtual size_t workspaceBytes(Sizes const& /* largest */) const {
        return 0;
    }
    // Puts the work on the stream; neither allocates nor synchronises, so that it can be captured into a CUDA graph.
    virtual cudaError_t launch(Call const& call) const = 0;

    Sizes sizesOf(nvinfer1::PluginTensorDesc const* inputs) const;

    Signature const& mSignature;
    // Nothing of a plugin changes after its construction, so threads may share it.
    std::vector<FieldValue> mFieldValues;
    std::string mMetadata;
    std::string mTimingCacheId;
    std::vector<nvinfer1::PluginField> mSerialized;
    nvinfer1::PluginFieldCollection mSerializedCollection{};
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    using Make = std::unique_ptr<Plugin> (*)(nvinfer1::PluginFieldCollection const* fields);

    Creator(Signature const& signature, Make make);

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    Signature const& mSignature;
    Make mMake;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

}  // namespace fly
