// The two functions that a plugin library shows to TensorRT. The plugin registry calls them when the library is loaded
// (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins), so nothing registers itself from a static initialiser and
// the library has no link to TensorRT.
#include "common/log.h"
#include "common/plugin.h"
#include "entropy_gate/entropy_gate_plugin.h"
#include "loose_window_accept/loose_window_accept_plugin.h"
#include "packed_accept/packed_accept_plugin.h"

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
