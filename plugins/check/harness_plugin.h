// A plugin with the three interfaces that TensorRT asks it for, and the descriptions of a case's tensors.
#pragma once

#include "check/harness_cases.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace fly::check {

struct Plugin {
    explicit Plugin(nvinfer1::IPluginV3* made) : owner(made) {
        if (made == nullptr) {
            throw std::runtime_error("no plugin was made");
        }
        using Capability = nvinfer1::PluginCapabilityType;
        core = static_cast<nvinfer1::IPluginV3OneCore*>(made->getCapabilityInterface(Capability::kCORE));
        build = static_cast<nvinfer1::IPluginV3OneBuild*>(made->getCapabilityInterface(Capability::kBUILD));
        runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(made->getCapabilityInterface(Capability::kRUNTIME));
        if (core == nullptr || build == nullptr || runtime == nullptr) {
            throw std::runtime_error("a plugin lacks its core, build or runtime interface");
        }
    }
    std::unique_ptr<nvinfer1::IPluginV3> owner;
    nvinfer1::IPluginV3OneCore* core;
    nvinfer1::IPluginV3OneBuild* build;
    nvinfer1::IPluginV3OneRuntime* runtime;
};

inline nvinfer1::PluginTensorDesc describe(Tensor const& tensor) {
    nvinfer1::PluginTensorDesc desc{};
    desc.dims.nbDims = static_cast<int32_t>(tensor.sizes.size());
    std::copy(tensor.sizes.begin(), tensor.sizes.end(), desc.dims.d);
    desc.type = tensor.types.front();
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    desc.scale = -1.0F;
    return desc;
}

inline std::vector<nvinfer1::PluginTensorDesc> describe(std::vector<Tensor> const& tensors) {
    std::vector<nvinfer1::PluginTensorDesc> descs;
    for (Tensor const& tensor : tensors) {
        descs.push_back(describe(tensor));
    }
    return descs;
}

// As a builder gives them: sizes unknown, with bounds of a profile that ends at the sizes of the case.
inline std::vector<nvinfer1::DynamicPluginTensorDesc> describeDynamic(std::vector<Tensor> const& tensors) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> descs;
    for (Tensor const& tensor : tensors) {
        nvinfer1::DynamicPluginTensorDesc dynamic{};
        dynamic.desc = describe(tensor);
        dynamic.min = dynamic.opt = dynamic.max = dynamic.desc.dims;
        for (size_t axis = 0; axis < tensor.sizes.size(); ++axis) {
            if (std::strchr("BTRS", tensor.shape[axis]) != nullptr) {
                dynamic.desc.dims.d[axis] = -1;
                dynamic.min.d[axis] = 1;
            }
        }
        descs.push_back(dynamic);
    }
    return descs;
}

}  // namespace fly::check
