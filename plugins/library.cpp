// The two functions that a plugin library shows to TensorRT. The plugin registry calls them when it loads the library
// (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins), and the library has no link to TensorRT.
//
// A program that loads no plugin library, such as TensorRT-LLM's worker, gets the plugins by
//
//   FLY_TRT_REGISTER_PLUGINS=1 LD_PRELOAD=libfly_plugins.so program
#include "common/log.h"
#include "common/plugin.h"
#include "entropy_gate/entropy_gate_plugin.h"
#include "loose_window_accept/loose_window_accept_plugin.h"
#include "packed_accept/packed_accept_plugin.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fly {
namespace {

template <typename TPlugin>
std::unique_ptr<Plugin> make(nvinfer1::PluginFieldCollection const* fields) {
    return std::make_unique<TPlugin>(fields);
}

}  // namespace
}  // namespace fly

#define FLY_EXPORT __attribute__((visibility("default")))

extern "C" FLY_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
    static fly::Creator entropyGate(fly::entropyGateSignature(), fly::make<fly::EntropyGatePlugin>);
    static fly::Creator looseWindowAccept(
        fly::looseWindowAcceptSignature(), fly::make<fly::LooseWindowAcceptPlugin>);
    static fly::Creator packedLooseAccept(
        fly::packedLooseAcceptSignature(), fly::make<fly::PackedLooseAcceptPlugin>);
    static nvinfer1::IPluginCreatorInterface* const creators[]{
        &entropyGate, &looseWindowAccept, &packedLooseAccept};
    nbCreators = 3;
    return creators;
}

extern "C" FLY_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    fly::setLoggerFinder(finder);
}

namespace fly {
namespace {

// Where it was asked for: in other processes the one that loads the library registers its creators. TensorRT is looked
// for by name, since not every process that inherits LD_PRELOAD has it; those that have are linked to it, so that it is
// in place before this runs.
__attribute__((constructor)) void registerWhereAsked() {
    char const* const asked = std::getenv("FLY_TRT_REGISTER_PLUGINS");
    bool const isAsked = asked != nullptr && std::strcmp(asked, "1") == 0;
    void* const found = isAsked ? dlsym(RTLD_DEFAULT, "getPluginRegistry") : nullptr;
    if (found == nullptr) {
        return;
    }
    auto* const registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*) ()>(found)();
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
    for (int32_t i = 0; registry != nullptr && i < count; ++i) {
        if (!registry->registerCreator(*creators[i], kNamespace)) {
            std::fputs("libfly_plugins.so: TensorRT's registry does not take its plugins\n", stderr);
        }
    }
}

}  // namespace
}  // namespace fly
