// Drives the plugins through TensorRT's own interfaces, without TensorRT: from the creators of the library through
// types, formats, shapes and serialisation to launches on the GPU, in the order of a builder and a runtime.
//
//   fly_plugin_harness libfly_plugins.so             everything
//   fly_plugin_harness libfly_plugins.so --no-gpu    everything but launches
//
// Prints what failed and a summary; the exit status is 0 when all held, 1 when a check failed, 2 when it could not run.
#include "check/harness_driver.h"
#include "check/harness_launches.h"

#include <functional>
#include <limits>

namespace fly::check {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

struct FieldCase {
    char const* plugin;
    std::vector<PluginField> fields;
    char const* error;  // text of the log line; empty when a plugin must be made
    char const* metadata;
};

void checkFields(Library const& library, RememberingLogger& logger, Report& report) {
    static int32_t const two = 2;
    static int32_t const zero = 0;
    static int32_t const pair[]{2, 3};
    static int64_t const nine = 9;
    static int64_t const eight = 8;
    static int64_t const beyondInt32 = (int64_t{1} << 32) + 3;  // 3 when cut to 32 bits
    static float const half = 0.5F;
    static double const quarter = 0.25;
    static float const negative = -0.5F;
    static float const notANumber = std::numeric_limits<float>::quiet_NaN();
    static float const infinity = std::numeric_limits<float>::infinity();
    static int32_t const three[]{2, 3, 5};
    static int32_t const many[65]{};
    std::string const packedEnd = ",use_full_entropy=0,entropy_top_k=3,window=6,lookahead=5,vocab_size=0,stop_token_ids=";
    std::string const packedDefault = "entropy_threshold=0.300000012" + packedEnd + "-1";
    std::string const packedQuarter = "entropy_threshold=0.25" + packedEnd + "-1";
    std::string const packedInfinity = "entropy_threshold=inf" + packedEnd + "-1";
    std::string const packedStops = "entropy_threshold=0.300000012" + packedEnd + "2|3|5";
    char const* const packed = "PackedLooseAccept";
    FieldCase const cases[]{
        {"EntropyGate", {}, "", "top_k=3"},
        {"EntropyGate", {{"top_k", &two, PluginFieldType::kINT32, 1}}, "", "top_k=2"},
        {"EntropyGate", {{"top_k", &eight, PluginFieldType::kINT64, 1}}, "", "top_k=8"},
        {"EntropyGate", {{"top_k", &zero, PluginFieldType::kINT32, 1}}, "top_k is 0, expected 1 to 8", ""},
        {"EntropyGate", {{"top_k", &nine, PluginFieldType::kINT64, 1}}, "top_k is 9, expected 1 to 8", ""},
        {"EntropyGate", {{"top_k", &beyondInt32, PluginFieldType::kINT64, 1}}, "top_k is 4294967299", ""},
        {"EntropyGate", {{"top_k", &half, PluginFieldType::kFLOAT32, 1}}, "expected one INT32 or INT64", ""},
        {"EntropyGate", {{"top_k", pair, PluginFieldType::kINT32, 2}}, "2 values, expected one", ""},
        {"EntropyGate", {{"top_k", nullptr, PluginFieldType::kINT32, 1}}, "expected one INT32 or INT64", ""},
        {"EntropyGate", {{"topk", &two, PluginFieldType::kINT32, 1}}, "unknown field 'topk', expected top_k", ""},
        {"EntropyGate", {{nullptr, &two, PluginFieldType::kINT32, 1}}, "unknown field ''", ""},
        {"LooseWindowAccept", {}, "", ""},
        {"LooseWindowAccept", {{"window", &two, PluginFieldType::kINT32, 1}}, "expected no fields", ""},
        {packed, {}, "", packedDefault.c_str()},
        {packed, {{"entropy_threshold", &quarter, PluginFieldType::kFLOAT64, 1}}, "", packedQuarter.c_str()},
        {packed, {{"entropy_threshold", &infinity, PluginFieldType::kFLOAT32, 1}}, "", packedInfinity.c_str()},
        {packed, {{"stop_token_ids", three, PluginFieldType::kINT32, 3}}, "", packedStops.c_str()},
        {packed, {{"entropy_threshold", &negative, PluginFieldType::kFLOAT32, 1}}, "is -0.5, expected 0 to inf", ""},
        {packed, {{"entropy_threshold", &notANumber, PluginFieldType::kFLOAT32, 1}}, "is nan, expected 0 to inf", ""},
        {packed, {{"entropy_threshold", &two, PluginFieldType::kINT32, 1}}, "expected one FLOAT32 or FLOAT64", ""},
        {packed, {{"stop_token_ids", three, PluginFieldType::kINT32, 0}}, "expected 1 to 64 INT32 or INT64", ""},
        {packed, {{"stop_token_ids", many, PluginFieldType::kINT32, 65}}, "65 values, expected 1 to 64", ""},
        {packed, {{"window", &beyondInt32, PluginFieldType::kINT64, 1}}, "4294967299, expected 0 to 1073741824", ""},
        {packed, {{"vocab_size", &two, PluginFieldType::kINT32, 1}}, "entropy_top_k is 3, expected at most vocab_size", ""},
    };
    for (FieldCase const& item : cases) {
        PluginFieldCollection const fields{static_cast<int32_t>(item.fields.size()), item.fields.data()};
        std::unique_ptr<nvinfer1::IPluginV3> const plugin(
            library.creator(item.plugin)->createPlugin("layer", &fields, nvinfer1::TensorRTPhase::kBUILD));
        std::string const what = std::string(item.plugin) + " with " + std::to_string(item.fields.size()) + " fields: ";
        if (*item.error != '\0') {
            bool const refused = plugin == nullptr && logger.tookError(item.error);
            report.expect(refused, what + "refused with '" + item.error + "'");
        } else if (plugin == nullptr) {
            report.expect(false, what + "made");
        } else {
            auto* const build = static_cast<nvinfer1::IPluginV3OneBuild*>(
                plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
            report.expect(std::string(build->getMetadataString()) == item.metadata, what + item.metadata);
        }
    }
}

int32_t run(char const* libraryPath, bool withGpu) {
    RememberingLogger logger;
    LoggerFinder finder(logger);
    Library const library(libraryPath, finder);
    Report report;
    report.expect(library.numCreators() == 3, "the library has three creators");
    for (char const* const name : {"EntropyGate", "LooseWindowAccept", "PackedLooseAccept"}) {
        if (library.creator(name) == nullptr) {
            throw std::runtime_error(std::string("the library has no creator for ") + name);
        }
        report.expect(!logger.tookError(""), std::string("no error is logged before ") + name + " is used");
    }
    checkFields(library, logger, report);
    auto const reported = [&report](Case const& item, char const* kind, std::function<void()> const& check) {
        int32_t const failedBefore = report.numFailed();
        check();
        std::printf("%s  %s, %s%s\n", report.numFailed() == failedBefore ? "ok    " : "FAILED", item.plugin.c_str(),
            item.name.c_str(), kind);
    };
    for (Case const& item : allCases()) {
        reported(item, "", [&] { drive(item, *library.creator(item.plugin), logger, report, withGpu); });
    }
    if (withGpu) {
        for (CasePair const& pair : pairsForOneWorkspace()) {
            reported(pair.first, ", two launches with one workspace",
                [&] { checkSharedWorkspace(pair, *library.creator(pair.first.plugin), report); });
        }
    }
    std::printf("%d checks, %d failed, built for TensorRT %d.%d%s\n", report.numChecks(), report.numFailed(),
        NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, withGpu ? "" : ", launches skipped (--no-gpu)");
    return report.numFailed() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fly::check

int main(int argc, char** argv) {
    bool const withGpu = argc != 3;
    if (argc < 2 || argc > 3 || (argc == 3 && std::string(argv[2]) != "--no-gpu")) {
        std::fprintf(stderr, "usage: %s LIBRARY [--no-gpu]\n", argv[0]);
        return 2;
    }
    try {
        return fly::check::run(argv[1], withGpu);
    } catch (std::exception const& error) {
        std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
        return 2;
    }
}
