// See harness_driver.h. The order is the one in which a builder and then a runtime call a plugin.
#include "check/harness_driver.h"


#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>

namespace fly::check {
namespace {

using namespace nvinfer1;

struct Plugin {
    explicit Plugin(IPluginV3* made) : owner(made) {
        if (made == nullptr) {
            throw std::runtime_error("no plugin was made");
        }
        core = static_cast<IPluginV3OneCore*>(made->getCapabilityInterface(PluginCapabilityType::kCORE));
        build = static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
        runtime = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        if (core == nullptr || build == nullptr || runtime == nullptr) {
            throw std::runtime_error("a plugin lacks its core, build or runtime interface");
        }
    }
    std::unique_ptr<IPluginV3> owner;
    IPluginV3OneCore* core;
    IPluginV3OneBuild* build;
    IPluginV3OneRuntime* runtime;
};

PluginFieldCollection collection(std::vector<PluginField> const& fields) {
    PluginFieldCollection result{};
    result.nbFields = static_cast<int32_t>(fields.size());
    result.fields = fields.data();
    return result;
}

PluginTensorDesc describe(Tensor const& tensor) {
    PluginTensorDesc desc{};
    desc.dims.nbDims = static_cast<int32_t>(tensor.sizes.size());
    std::copy(tensor.sizes.begin(), tensor.sizes.end(), desc.dims.d);
    desc.type = tensor.types.front();
    desc.format = TensorFormat::kLINEAR;
    desc.scale = -1.0F;
    return desc;
}

std::vector<PluginTensorDesc> describe(std::vector<Tensor> const& tensors) {
    std::vector<PluginTensorDesc> descs;
    for (Tensor const& tensor : tensors) {
        descs.push_back(describe(tensor));
    }
    return descs;
}

// As a builder gives them: sizes unknown, with bounds of a profile that ends at the sizes of the case.
std::vector<DynamicPluginTensorDesc> describeDynamic(std::vector<Tensor> const& tensors) {
    std::vector<DynamicPluginTensorDesc> descs;
    for (Tensor const& tensor : tensors) {
        DynamicPluginTensorDesc dynamic{};
        dynamic.desc = describe(tensor);
        dynamic.min = dynamic.opt = dynamic.max = dynamic.desc.dims;
        for (size_t axis = 0; axis < tensor.sizes.size(); ++axis) {
            if (tensor.shape[axis] == 'B' || tensor.shape[axis] == 'T') {
                dynamic.desc.dims.d[axis] = -1;
                dynamic.min.d[axis] = 1;
            }
        }
        descs.push_back(dynamic);
    }
    return descs;
}

class Driver {
public:
    Driver(Case const& work, IPluginCreatorV3One& creator, RememberingLogger& logger, Report& report)
        : mCase(work), mCreator(creator), mLogger(logger), mReport(report),
          mNumInputs(static_cast<int32_t>(work.inputs.size())), mNumOutputs(static_cast<int32_t>(work.outputs.size())),
          mInputs(describe(work.inputs)), mOutputs(describe(work.outputs)) {}

    void drive(bool withGpu) {
        PluginFieldCollection const fields = collection(mCase.fields);
        Plugin const plugin(mCreator.createPlugin("layer", &fields, TensorRTPhase::kBUILD));
        checkIdentity(plugin);
        checkTypes(plugin);
        checkShapes(plugin);
        checkFormats(plugin);
        checkConfiguration(plugin);
        checkShapeChange(plugin);
        Plugin const copied(plugin.owner->clone());
        checkIdentity(copied);
        Plugin const restored = restore(copied);
        checkIdentity(restored);
        Plugin const attached(restored.runtime->attachToContext(nullptr));
        checkIdentity(attached);
        std::string const name(plugin.build->getMetadataString());
        expect(restored.build->getMetadataString() == name, "the restored plugin was made the same way: " + name);
        if (withGpu) {
            checkLaunches(plugin, attached);
        }
    }

private:
    void expect(bool holds, std::string const& what) {
        mReport.expect(holds, mCase.plugin + " (" + mCase.name + "): " + what);
    }
    void expectRefusal(bool refused, std::string const& text, std::string const& what) {
        expect(refused && mLogger.tookError(text), what + " is refused, with '" + text + "' in the log");
    }

    void checkIdentity(Plugin const& plugin) {
        expect(plugin.core->getPluginName() == mCase.plugin && plugin.core->getPluginVersion() == std::string("1")
                && plugin.core->getPluginNamespace() == std::string("fly"),
            "name, version and namespace");
    }

    void checkTypes(Plugin const& plugin) {
        expect(plugin.build->getNbOutputs() == mNumOutputs, "number of outputs");
        std::vector<DataType> inputs;
        std::vector<DataType> outputs(mCase.outputs.size(), DataType::kINT8);
        for (Tensor const& tensor : mCase.inputs) {
            inputs.push_back(tensor.types.front());
        }
        auto const query = [&](int32_t numInputs) {
            return plugin.build->getOutputDataTypes(outputs.data(), mNumOutputs, inputs.data(), numInputs);
        };
        expect(query(mNumInputs) == 0, "output types are known");
        for (size_t i = 0; i < outputs.size(); ++i) {
            expect(outputs[i] == mCase.outputs[i].types.front(), "type of " + mCase.outputs[i].name);
        }
        std::string const oneLess = "got " + std::to_string(mNumInputs - 1) + " inputs";
        expectRefusal(query(mNumInputs - 1) != 0, oneLess, "a missing input");
        inputs.back() = DataType::kINT8;
        expectRefusal(query(mNumInputs) != 0, mCase.inputs.back().name + " is", "an input of type int8");
    }

    // Asks for the output shapes of inputs whose sizes are unknown but for those in `known`.
    int32_t queryShapes(Plugin const& plugin, std::vector<std::vector<int64_t>> const& known,
        std::map<char, std::unique_ptr<Expression>>& letters, std::vector<DimsExprs>& outputs, int32_t extraDims) {
        std::vector<std::unique_ptr<Expression>> constants;
        std::vector<DimsExprs> inputs(mCase.inputs.size());
        for (size_t i = 0; i < inputs.size(); ++i) {
            std::string const& shape = mCase.inputs[i].shape;
            inputs[i].nbDims = static_cast<int32_t>(shape.size()) + (i == 0 ? extraDims : 0);
            for (size_t axis = 0; axis < shape.size(); ++axis) {
                auto& letter = letters[shape[axis]];
                if (letter == nullptr) {
                    letter = std::make_unique<Expression>(Expression::kUnknown);
                }
                inputs[i].d[axis] = letter.get();
                if (!known.empty()) {
                    constants.push_back(std::make_unique<Expression>(known[i][axis]));
                    inputs[i].d[axis] = constants.back().get();
                }
            }
        }
        ExpressionBuilder builder;
        outputs.resize(mCase.outputs.size());
        return plugin.build->getOutputShapes(
            inputs.data(), mNumInputs, nullptr, 0, outputs.data(), mNumOutputs, builder);
    }

    void checkShapes(Plugin const& plugin) {
        std::map<char, std::unique_ptr<Expression>> letters;
        std::vector<DimsExprs> outputs;
        expect(queryShapes(plugin, {}, letters, outputs, 0) == 0, "output shapes are known for unknown sizes");
        for (size_t i = 0; i < outputs.size(); ++i) {
            std::string const& shape = mCase.outputs[i].shape;
            bool equal = outputs[i].nbDims == static_cast<int32_t>(shape.size());
            for (size_t axis = 0; equal && axis < shape.size(); ++axis) {
                equal = outputs[i].d[axis] == letters[shape[axis]].get();
            }
            expect(equal, "shape of " + mCase.outputs[i].name);
        }
        std::vector<std::vector<int64_t>> known;
        for (Tensor const& tensor : mCase.inputs) {
            known.push_back(tensor.sizes);
        }
        expect(queryShapes(plugin, known, letters, outputs, 0) == 0, "output shapes are known for constant sizes");
        known[1][0] += 1;
        bool const contradictionRefused = queryShapes(plugin, known, letters, outputs, 0) != 0;
        expectRefusal(contradictionRefused, "has B = ", "a contradiction of constant sizes");
        expectRefusal(queryShapes(plugin, {}, letters, outputs, 1) != 0, "dimensions, expected [B, T", "a wrong rank");
    }

    void checkFormats(Plugin const& plugin) {
        std::vector<DynamicPluginTensorDesc> descs = describeDynamic(mCase.inputs);
        std::vector<DynamicPluginTensorDesc> const outputs = describeDynamic(mCase.outputs);
        descs.insert(descs.end(), outputs.begin(), outputs.end());
        for (int32_t pos = 0; pos < mNumInputs + mNumOutputs; ++pos) {
            Tensor const& tensor = pos < mNumInputs ? mCase.inputs[pos] : mCase.outputs[pos - mNumInputs];
            for (int32_t type = 0; type < EnumMax<DataType>(); ++type) {
                for (int32_t format = 0; format < EnumMax<TensorFormat>(); ++format) {
                    std::vector<DynamicPluginTensorDesc> asked = descs;
                    asked[pos].desc.type = static_cast<DataType>(type);
                    asked[pos].desc.format = static_cast<TensorFormat>(format);
                    bool const takes = asked[pos].desc.format == TensorFormat::kLINEAR
                        && std::count(tensor.types.begin(), tensor.types.end(), asked[pos].desc.type) == 1;
                    expect(plugin.build->supportsFormatCombination(pos, asked.data(), mNumInputs, mNumOutputs) == takes,
                        tensor.name + " of type code " + std::to_string(type) + ", format " + std::to_string(format));
                }
            }
        }
        expectRefusal(!plugin.build->supportsFormatCombination(99, descs.data(), mNumInputs, mNumOutputs), "tensor 99",
            "a position out of range");
    }

    void checkConfiguration(Plugin const& plugin) {
        std::vector<DynamicPluginTensorDesc> inputs = describeDynamic(mCase.inputs);
        std::vector<DynamicPluginTensorDesc> const outputs = describeDynamic(mCase.outputs);
        auto const configure
            = [&] { return plugin.build->configurePlugin(inputs.data(), mNumInputs, outputs.data(), mNumOutputs); };
        auto const workspace
            = [&] { return plugin.build->getWorkspaceSize(inputs.data(), mNumInputs, outputs.data(), mNumOutputs); };
        expect(configure() == 0, "a valid configuration");
        size_t const largest = workspace();
        for (DynamicPluginTensorDesc& desc : inputs) {
            desc.max = desc.min;
        }
        expect(workspace() <= largest, "a smaller problem needs no more workspace");
        inputs = describeDynamic(mCase.inputs);
        inputs[1].desc.type = DataType::kFP8;
        expectRefusal(configure() != 0, mCase.inputs[1].name + " is", "a configuration with a wrong type");
        inputs = describeDynamic(mCase.inputs);
        size_t const lastAxis = mCase.inputs[0].sizes.size() - 1;  // of logits the vocabulary, of next_tokens T
        inputs[0].max.d[lastAxis] = 0;
        expectRefusal(configure() != 0, "expected at least", "a configuration with an empty last dimension");
    }

    void checkShapeChange(Plugin const& plugin) {
        auto const change = [&](std::vector<PluginTensorDesc> const& inputs) {
            return plugin.runtime->onShapeChange(inputs.data(), mNumInputs, mOutputs.data(), mNumOutputs);
        };
        expect(change(mInputs) == 0, "valid shapes");
        std::vector<PluginTensorDesc> wrong = mInputs;
        wrong[1].dims.d[1] += 1;
        expectRefusal(change(wrong) != 0, "give both the same size", "a contradiction of shapes");
        // Refused before anything is launched, so that it can be tried without a GPU.
        expectRefusal(plugin.runtime->enqueue(wrong.data(), mOutputs.data(), nullptr, nullptr, nullptr, nullptr) != 0,
            "give both the same size", "a launch with a contradiction of shapes");
    }

    Plugin restore(Plugin const& plugin) {
        PluginFieldCollection const* const fields = plugin.runtime->getFieldsToSerialize();
        bool const complete = fields != nullptr && fields->nbFields == mCreator.getFieldNames()->nbFields;
        expect(complete, "all fields are serialised");
        return Plugin(mCreator.createPlugin("layer", fields, TensorRTPhase::kRUNTIME));
    }

    // One launch on fresh memory; captured into a CUDA graph and replayed when `inGraph`. Returns the output bytes.
    std::vector<std::vector<char>> launch(Plugin const& plugin, bool inGraph) {
        std::vector<DeviceBuffer> buffers;
        std::vector<void const*> inputs;
        std::vector<void*> outputs;
        for (Tensor const& tensor : mCase.inputs) {
            buffers.emplace_back(tensor.bytes.size()).upload(tensor.bytes);
            inputs.push_back(buffers.back().data());
        }
        for (Tensor const& tensor : mCase.outputs) {
            outputs.push_back(buffers.emplace_back(tensor.bytes.size()).data());
        }
        auto const dynamicInputs = describeDynamic(mCase.inputs);
        auto const dynamicOutputs = describeDynamic(mCase.outputs);
        DeviceBuffer const workspace(plugin.build->getWorkspaceSize(
            dynamicInputs.data(), mNumInputs, dynamicOutputs.data(), mNumOutputs));
        cudaStream_t stream{};
        checkCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
        if (inGraph) {
            checkCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
        }
        int32_t const status = plugin.runtime->enqueue(
            mInputs.data(), mOutputs.data(), inputs.data(), outputs.data(), workspace.data(), stream);
        expect(status == 0, inGraph ? "a launch under capture" : "a launch");
        if (inGraph) {
            cudaGraph_t graph{};
            cudaGraphExec_t executable{};
            checkCuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
            checkCuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
            checkCuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
            checkCuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch again");
            checkCuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
            checkCuda(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
            checkCuda(cudaGraphDestroy(graph), "cudaGraphDestroy");
        }
        checkCuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        checkCuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
        std::vector<std::vector<char>> results;
        for (size_t i = 0; i < outputs.size(); ++i) {
            results.push_back(buffers[mCase.inputs.size() + i].download());
        }
        return results;
    }

    void checkLaunches(Plugin const& plugin, Plugin const& attached) {
        std::vector<std::vector<char>> const results = launch(plugin, false);
        for (size_t i = 0; i < results.size(); ++i) {
            Tensor const& expected = mCase.outputs[i];
            expect(agree(results[i], expected), "values of " + expected.name);
        }
        expect(launch(attached, false) == results, "the serialised, restored and attached plugin gives the same bits");
        expect(launch(attached, true) == results, "a CUDA graph gives the same bits");
    }

    bool agree(std::vector<char> const& got, Tensor const& expected) const {
        if (expected.types.front() != DataType::kFLOAT) {
            return got == expected.bytes;
        }
        for (size_t at = 0; at < got.size(); at += sizeof(float)) {
            float a{};
            float b{};
            std::memcpy(&a, got.data() + at, sizeof(float));
            std::memcpy(&b, expected.bytes.data() + at, sizeof(float));
            if (!(std::abs(static_cast<double>(a) - b) <= mCase.tolerance)) {
                return false;
            }
        }
        return true;
    }

    Case const& mCase;
    IPluginCreatorV3One& mCreator;
    RememberingLogger& mLogger;
    Report& mReport;
    int32_t mNumInputs;
    int32_t mNumOutputs;
    std::vector<PluginTensorDesc> mInputs;
    std::vector<PluginTensorDesc> mOutputs;
};

}  // namespace

void drive(Case const& work, IPluginCreatorV3One& creator, RememberingLogger& logger, Report& report, bool withGpu) {
    Driver(work, creator, logger, report).drive(withGpu);
}

}  // namespace fly::check
