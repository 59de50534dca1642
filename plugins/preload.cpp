// Registers the plugins in a program that loads no plugins by itself, such as TensorRT-LLM's worker of an engine that
// spans several GPUs: where the library is preloaded (LD_PRELOAD) and FLY_PLUGINS_REGISTER is set, it asks TensorRT's
// registry to load it, before the program's main function. Elsewhere, and in a process without TensorRT, it does
// nothing. A failure is said on stderr; the engine that needs the plugins is then the one that is not loaded.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace fly {
namespace {

__attribute__((constructor)) void registerWhereAsked() {
    if (std::getenv("FLY_PLUGINS_REGISTER") == nullptr) {
        return;
    }
    // Not linked to: the program has the version of TensorRT that it was made for.
    using GetRegistry = nvinfer1::IPluginRegistry* (*)();
    auto const getRegistry = reinterpret_cast<GetRegistry>(dlsym(RTLD_DEFAULT, "getPluginRegistry"));
    Dl_info self{};
    if (getRegistry == nullptr || dladdr(reinterpret_cast<void*>(&registerWhereAsked), &self) == 0) {
        return;
    }
    nvinfer1::IPluginRegistry* const registry = getRegistry();
    if (registry == nullptr || registry->loadLibrary(self.dli_fname) == nullptr) {
        std::fprintf(stderr, "%s: TensorRT's registry does not take the plugins\n", self.dli_fname);
    }
}

}  // namespace
}  // namespace fly
