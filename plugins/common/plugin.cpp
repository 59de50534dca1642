// See plugin.h. Errors while building name the tensor and what was expected; TensorRT itself only says that a plugin
// failed.
#include "common/plugin.h"

#include "common/log.h"

#include <array>
#include <iomanip>
#include <limits>
#include <sstream>
#include <utility>

namespace fly {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace {

constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = 1;

PluginFieldCollection collectionOf(std::vector<PluginField> const& fields) {
    PluginFieldCollection collection{};
    collection.nbFields = static_cast<int32_t>(fields.size());
    collection.fields = fields.data();
    return collection;
}

std::string textOf(Field const& field, FieldValue const& value) {
    std::ostringstream text;
    if (field.kind == FieldKind::kReal) {
        text << std::setprecision(std::numeric_limits<float>::max_digits10) << value.real;
    }
    char const* separator = "";
    for (int32_t const integer : value.integers) {
        text << separator << integer;
        separator = "|";
    }
    return text.str();
}

PluginFieldType typeOf(Field const& field) {
    return field.kind == FieldKind::kReal ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
}

}  // namespace

Plugin::Plugin(Signature const& signature, PluginFieldCollection const* fields)
    : Plugin(signature, readFields(signature, fields)) {}

Plugin::Plugin(Plugin const& other) : Plugin(other.mSignature, other.mFieldValues) {}

Plugin::Plugin(Signature const& signature, std::vector<FieldValue> fieldValues)
    : mSignature(signature), mFieldValues(std::move(fieldValues)) {
    for (size_t i = 0; i < mFieldValues.size(); ++i) {
        Field const& field = signature.fields[i];
        FieldValue const& value = mFieldValues[i];
        mMetadata += std::string(i == 0 ? "" : ",") + field.name + "=" + textOf(field, value);
        bool const isReal = field.kind == FieldKind::kReal;
        void const* const data = isReal ? static_cast<void const*>(&value.real) : value.integers.data();
        int32_t const length = isReal ? 1 : static_cast<int32_t>(value.integers.size());
        mSerialized.emplace_back(field.name, data, typeOf(field), length);
    }
    mSerializedCollection = collectionOf(mSerialized);
    mTimingCacheId = std::string(signature.name) + (mMetadata.empty() ? "" : ";") + mMetadata;
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
    return guarded<nvinfer1::IPluginV3*>(mSignature.name, nullptr, [this] { return copy().release(); });
}

char const* Plugin::getPluginName() const noexcept {
    return mSignature.name;
}

char const* Plugin::getPluginVersion() const noexcept {
    return kVersion;
}

char const* Plugin::getPluginNamespace() const noexcept {
    return kNamespace;
}

int32_t Plugin::getNbOutputs() const noexcept {
    return static_cast<int32_t>(mSignature.outputs.size());
}

int32_t Plugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept {
    return guarded(mSignature.name, kFailure, [&] {
        checkCount(mSignature.inputs, nbInputs, "inputs");
        checkCount(mSignature.outputs, nbOutputs, "outputs");
        for (int32_t i = 0; i < nbInputs; ++i) {
            checkType(mSignature.inputs[i], inputTypes[i]);
        }
        for (int32_t i = 0; i < nbOutputs; ++i) {
            std::vector<DataType> const& types = mSignature.outputs[i].types;
            outputTypes[i] = types.empty() ? inputTypes[0] : types.front();
        }
        return kSuccess;
    });
}

int32_t Plugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const* /* shapeInputs */,
    int32_t nbShapeInputs, DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept {
    return guarded(mSignature.name, kFailure, [&] {
        checkCount(mSignature.inputs, nbInputs, "inputs");
        checkCount(mSignature.outputs, nbOutputs, "outputs");
        if (nbShapeInputs != 0) {
            fail("got ", nbShapeInputs, " shape inputs, expected none: remove tensorrt_plugin_shape_input_indices");
        }
        std::array<IDimensionExpr const*, 26> sizes{};
        for (int32_t i = 0; i < nbInputs; ++i) {
            TensorSpec const& tensor = mSignature.inputs[i];
            checkRank(tensor, inputs[i].nbDims);
            for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) {
                IDimensionExpr const* const size = inputs[i].d[axis];
                IDimensionExpr const*& known = sizes[static_cast<size_t>(tensor.shape[axis] - 'A')];
                if (size->isConstant()) {
                    checkSize(tensor, tensor.shape[axis], size->getConstantValue());
                }
                if (known == nullptr) {
                    known = size;
                } else if (known->isConstant() && size->isConstant()
                    && known->getConstantValue() != size->getConstantValue()) {
                    fail(tensor.name, " has ", tensor.shape[axis], " = ", size->getConstantValue(),
                        ", but an input before it has ", known->getConstantValue(), ": give both the same size");
                }
            }
        }
        for (size_t i = 0; i < mFieldValues.size(); ++i) {
            char const letter = mSignature.fields[i].letter;
            if (letter != '\0') {
                sizes[static_cast<size_t>(letter - 'A')] = exprBuilder.constant(integer(i));
            }
        }
        for (int32_t i = 0; i < nbOutputs; ++i) {
            outputs[i].nbDims = 0;
            for (char const* letter = mSignature.outputs[i].shape; *letter != '\0'; ++letter) {
                outputs[i].d[outputs[i].nbDims++] = sizes[static_cast<size_t>(*letter - 'A')];
            }
        }
        return kSuccess;
    });
}

bool Plugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept {
    return guarded(mSignature.name, false, [&] {
        checkCount(mSignature.inputs, nbInputs, "inputs");
        checkCount(mSignature.outputs, nbOutputs, "outputs");
        if (pos < 0 || pos >= nbInputs + nbOutputs) {
            fail("asked for the format of tensor ", pos, ", expected 0 to ", nbInputs + nbOutputs - 1);
        }
        TensorSpec const& tensor = pos < nbInputs ? mSignature.inputs[pos] : mSignature.outputs[pos - nbInputs];
        PluginTensorDesc const& desc = inOut[pos].desc;
        bool const hasType = tensor.types.empty() ? desc.type == inOut[0].desc.type : isOneOf(desc.type, tensor.types);
        return desc.format == nvinfer1::TensorFormat::kLINEAR && hasType;
    });
}

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* /* out */, int32_t nbOutputs) noexcept {
    return guarded(mSignature.name, kFailure, [&] {
        checkCount(mSignature.inputs, nbInputs, "inputs");
        checkCount(mSignature.outputs, nbOutputs, "outputs");
        for (int32_t i = 0; i < nbInputs; ++i) {
            TensorSpec const& tensor = mSignature.inputs[i];
            checkType(tensor, in[i].desc.type);
            checkRank(tensor, in[i].max.nbDims);
            // Only single sizes are checked: the bounds of two tensors may differ where their sizes never do.
            for (int32_t axis = 0; axis < in[i].max.nbDims; ++axis) {
                if (in[i].max.d[axis] >= 0) {
                    checkSize(tensor, tensor.shape[axis], in[i].max.d[axis]);
                }
            }
        }
        return kSuccess;
    });
}

size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const* /* outputs */, int32_t /* nbOutputs */) const noexcept {
    return guarded(mSignature.name, size_t{0}, [&] {
        checkCount(mSignature.inputs, nbInputs, "inputs");
        Sizes largest;
        for (int32_t i = 0; i < nbInputs; ++i) {
            largest.grow(mSignature.inputs[i], inputs[i].max);
        }
        std::string unbounded;
        for (int32_t i = 0; i < nbInputs; ++i) {
            TensorSpec const& tensor = mSignature.inputs[i];
            for (int32_t axis = 0; axis < inputs[i].max.nbDims; ++axis) {
                char const letter = tensor.shape[axis];
                if (inputs[i].max.d[axis] >= 0) {
                    checkSize(tensor, letter, inputs[i].max.d[axis]);
                } else if (largest[letter] == 0) {
                    unbounded += std::string(unbounded.empty() ? "" : ", ") + letter + " of " + tensor.name;
                    largest.grow(letter, 1);
                }
            }
        }
        size_t const numBytes = workspaceBytes(largest);
        // Without a bound 0 bytes would be reserved, and only a launch would fail, with nothing about the cause.
        if (numBytes > 0 && !unbounded.empty()) {
            fail("the workspace needs an upper bound for ", unbounded,
                ", and there is none: set a maximum shape in the optimization profile");
        }
        return numBytes;
    });
}

// TensorRT's own key holds the shapes and types. That it holds the plugin's name is not documented, so the name is
// here, with how the plugin was made.
char const* Plugin::getTimingCacheID() noexcept {
    return mTimingCacheId.c_str();
}

char const* Plugin::getMetadataString() noexcept {
    return mMetadata.c_str();
}

Sizes Plugin::sizesOf(PluginTensorDesc const* inputs) const {
    Sizes sizes;
    for (size_t i = 0; i < mSignature.inputs.size(); ++i) {
        TensorSpec const& tensor = mSignature.inputs[i];
        checkType(tensor, inputs[i].type);
        sizes.add(tensor, inputs[i].dims);
        for (int32_t axis = 0; axis < inputs[i].dims.nbDims; ++axis) {
            checkSize(tensor, tensor.shape[axis], inputs[i].dims.d[axis]);
        }
    }
    return sizes;
}

int32_t Plugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* /* out */, int32_t nbOutputs) noexcept {
    return guarded(mSignature.name, kFailure, [&] {
        checkCount(mSignature.inputs, nbInputs, "inputs");
        checkCount(mSignature.outputs, nbOutputs, "outputs");
        sizesOf(in);
        return kSuccess;
    });
}

int32_t Plugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /* outputDesc */,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return guarded(mSignature.name, kFailure, [&] {
        Call const call{sizesOf(inputDesc), inputDesc, inputs, outputs, workspace, stream};
        cudaError_t const status = launch(call);
        if (status != cudaSuccess) {
            fail("launch failed with ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
        }
        return kSuccess;
    });
}

// A plugin holds nothing that belongs to one execution context: scratch memory is TensorRT's workspace.
nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext* /* context */) noexcept {
    return clone();
}

PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
    return &mSerializedCollection;
}

Creator::Creator(Signature const& signature, Make make) : mSignature(signature), mMake(make) {
    for (Field const& field : signature.fields) {
        mFields.emplace_back(field.name, nullptr, typeOf(field), 1);
    }
    mFieldCollection = collectionOf(mFields);
}

nvinfer1::IPluginV3* Creator::createPlugin(
    char const* /* name */, PluginFieldCollection const* fields, nvinfer1::TensorRTPhase /* phase */) noexcept {
    return guarded<nvinfer1::IPluginV3*>(mSignature.name, nullptr, [&] { return mMake(fields).release(); });
}

PluginFieldCollection const* Creator::getFieldNames() noexcept {
    return &mFieldCollection;
}

char const* Creator::getPluginName() const noexcept {
    return mSignature.name;
}

char const* Creator::getPluginVersion() const noexcept {
    return kVersion;
}

char const* Creator::getPluginNamespace() const noexcept {
    return kNamespace;
}

}  // namespace fly
