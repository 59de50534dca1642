// Which kernels run here: the best kind that the processor and the system offer and whose results are right.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "processor.h"
#include "self_test.h"

namespace fly {
namespace {

struct Kind {
    const char* name;
    bool (*is_offered)();
    const Kernels* (*kernels)();
};

bool offers_avx2() { return processor().has_avx2; }
bool offers_avx_vnni() { return processor().has_avx_vnni; }
bool offers_avx512() { return processor().has_avx512; }
bool offers_avx512_vnni() { return processor().has_avx512_vnni; }

// A process has to ask for the tiles' registers; the system keeps them for all of its threads from then on.
bool offers_amx() {
    if (!processor().has_amx) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// The best first. The emulation is for tests and asked for by its name alone.
constexpr Kind kKinds[] = {
    {"amx", offers_amx, amx_kernels},
    {"avx512_vnni", offers_avx512_vnni, avx512_vnni_kernels},
    {"avx_vnni", offers_avx_vnni, avx_vnni_kernels},
    {"avx512", offers_avx512, avx512_kernels},
    {"avx2", offers_avx2, avx2_kernels},
    {"amx_emulated", offers_avx2, amx_emulated_kernels},
};

constexpr const char* kVariable = "FLY_TRT_CPU_ISA";

std::string offered_names() {
    std::string names;
    for (const Kind& kind : kKinds)
        if (kind.is_offered()) names += (names.empty() ? "" : ", ") + std::string(kind.name);
    return names;
}

[[noreturn]] void fail_without_kernels() {
    throw std::runtime_error(
        "this CPU has no AVX2, FMA and F16C, which fly-trt's own kernels need: rebuild with fly-build --cpu-kernels off");
}

const Kernels& named(const std::string& name) {
    if (offered_names().empty()) fail_without_kernels();
    const std::string asked = std::string(kVariable) + " '" + name + "': ";
    for (const Kind& kind : kKinds) {
        if (name != kind.name || !kind.is_offered()) continue;
        if (computes_rightly(*kind.kernels())) return *kind.kernels();
        throw std::runtime_error(asked + "gives wrong results on this machine: unset it");
    }
    throw std::runtime_error(asked + "expected one of this machine's kinds: " + offered_names());
}

const Kernels& best() {
    for (const Kind& kind : kKinds) {
        if (!kind.is_offered()) continue;
        if (computes_rightly(*kind.kernels())) return *kind.kernels();
        std::fprintf(
            stderr, "fly-trt: the CPU kernels %s give wrong results on this machine and are not used\n", kind.name);
    }
    fail_without_kernels();
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& table = [&]() -> const Kernels& {
        const char* name = std::getenv(kVariable);
        return name != nullptr && *name != '\0' ? named(name) : best();
    }();
    return table;
}

}  // namespace fly
