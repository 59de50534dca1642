// See harness_driver.h. The order is the one in which a builder and then a runtime call a plugin.
#include "check/harness_driver.h"

#include "check/harness_launches.h"

#include <algorithm>
#include <map>
#include <memory>

namespace fly::check {
namespace {

using namespace nvinfer1;

PluginFieldCollection collection(std::vector<PluginField> const& fields) {
    PluginFieldCollection result{};
    result.nbFields = static_cast<int32_t>(fields.size());
    result.fields = fields.data();
    return result;
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
        if (!mCase.fields.empty()) {
            void const* const values = plugin.runtime->getFieldsToSerialize()->fields[0].data;
            void const* const copiedValues = copied.runtime->getFieldsToSerialize()->fields[0].data;
            expect(values != copiedValues, "a copy serialises its own values");
        }
        Plugin const restored = restore(copied);
        checkIdentity(restored);
        Plugin const attached(restored.runtime->attachToContext(nullptr));
        checkIdentity(attached);
        std::string const name(plugin.build->getMetadataString());
        expect(restored.build->getMetadataString() == name, "the restored plugin was made the same way: " + name);
        if (withGpu) {
            checkLaunches(mCase, plugin, attached, mReport);
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
        expect(plugin.core->getPluginName() == mCase.plugin && plugin.core->getPluginVersion() == std::string("2")
                && plugin.core->getPluginNamespace() == std::string("fly"),
            "name, version and namespace");
        std::string const fields(plugin.build->getMetadataString());
        std::string const timingCacheId = mCase.plugin + (fields.empty() ? "" : ";") + fields;
        expect(plugin.build->getTimingCacheID() == timingCacheId, "the timing cache's key is " + timingCacheId);
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
        outputs.resize(mCase.outputs.size());
        return plugin.build->getOutputShapes(
            inputs.data(), mNumInputs, nullptr, 0, outputs.data(), mNumOutputs, mBuilder);
    }

    void checkShapes(Plugin const& plugin) {
        std::map<char, std::unique_ptr<Expression>> letters;
        std::vector<DimsExprs> outputs;
        expect(queryShapes(plugin, {}, letters, outputs, 0) == 0, "output shapes are known for unknown sizes");
        for (size_t i = 0; i < outputs.size(); ++i) {
            std::string const& shape = mCase.outputs[i].shape;
            bool equal = outputs[i].nbDims == static_cast<int32_t>(shape.size());
            for (size_t axis = 0; equal && axis < shape.size(); ++axis) {
                IDimensionExpr const* const size = outputs[i].d[axis];
                auto const letter = letters.find(shape[axis]);
                // A letter that no input has is the size that a field says.
                equal = letter != letters.end()
                    ? size == letter->second.get()
                    : size->isConstant() && size->getConstantValue() == mCase.outputs[i].sizes[axis];
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
        std::string const contradicted = std::string("has ") + mCase.inputs[1].shape[0] + " = ";
        expectRefusal(contradictionRefused, contradicted, "a contradiction of constant sizes");
        std::string const& first = mCase.inputs[0].shape;
        std::string const wantedRank = std::string("dimensions, expected [") + first[0] + ", " + first[1];
        expectRefusal(queryShapes(plugin, {}, letters, outputs, 1) != 0, wantedRank, "a wrong rank");
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
        checkUnboundedWorkspace(plugin, largest > 0);
        inputs = describeDynamic(mCase.inputs);
        inputs[1].desc.type = DataType::kFP8;
        expectRefusal(configure() != 0, mCase.inputs[1].name + " is", "a configuration with a wrong type");
        inputs = describeDynamic(mCase.inputs);
        size_t const lastAxis = mCase.inputs[0].sizes.size() - 1;  // of logits the vocabulary, of next_tokens T
        inputs[0].max.d[lastAxis] = 0;
        expectRefusal(configure() != 0, "expected at least", "a configuration with an empty last dimension");
    }

    void checkUnboundedWorkspace(Plugin const& plugin, bool needsWorkspace) {
        std::vector<DynamicPluginTensorDesc> inputs = describeDynamic(mCase.inputs);
        std::vector<DynamicPluginTensorDesc> const outputs = describeDynamic(mCase.outputs);
        auto const workspace
            = [&] { return plugin.build->getWorkspaceSize(inputs.data(), mNumInputs, outputs.data(), mNumOutputs); };
        size_t const bounded = workspace();
        inputs[0].max.d[0] = -1;
        expect(workspace() == bounded, "the workspace when another input bounds the same size");
        for (DynamicPluginTensorDesc& desc : inputs) {
            desc.max.d[0] = -1;
        }
        bool const empty = workspace() == 0;
        if (needsWorkspace) {
            expectRefusal(empty, "set a maximum shape in the optimization profile", "a workspace without bounds");
        } else {
            expect(empty && !mLogger.tookError(""), "without a workspace no bounds are needed");
        }
    }

    void checkShapeChange(Plugin const& plugin) {
        auto const change = [&](std::vector<PluginTensorDesc> const& inputs) {
            return plugin.runtime->onShapeChange(inputs.data(), mNumInputs, mOutputs.data(), mNumOutputs);
        };
        expect(change(mInputs) == 0, "valid shapes");
        std::vector<PluginTensorDesc> wrong = mInputs;
        wrong[1].dims.d[wrong[1].dims.nbDims - 1] += 1;
        expectRefusal(change(wrong) != 0, "give both the same size", "a contradiction of shapes");
        // Refused before anything is launched, so that it can be tried without a GPU.
        expectRefusal(plugin.runtime->enqueue(wrong.data(), mOutputs.data(), nullptr, nullptr, nullptr, nullptr) != 0,
            "give both the same size", "a launch with a contradiction of shapes");
    }

    Plugin restore(Plugin const& plugin) {
        PluginFieldCollection const* const fields = plugin.runtime->getFieldsToSerialize();
        bool const complete = fields != nullptr && fields->nbFields == mCreator.getFieldNames()->nbFields;
        expect(complete, "all fields are serialised");
        expect(plugin.runtime->getFieldsToSerialize() == fields, "a second serialisation gives the same fields");
        return Plugin(mCreator.createPlugin("layer", fields, TensorRTPhase::kRUNTIME));
    }

    Case const& mCase;
    IPluginCreatorV3One& mCreator;
    RememberingLogger& mLogger;
    Report& mReport;
    ExpressionBuilder mBuilder;
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
