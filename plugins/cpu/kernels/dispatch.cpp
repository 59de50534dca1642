// Which kernels run here.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fly {
namespace {

const Kernels& chosen() {
    if (__builtin_cpu_supports("avx512vnni")) return *avx512_vnni_kernels();
    throw std::runtime_error("no");
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& table = chosen();
    return table;
}

}  // namespace fly
