// The product of kernels_amx.cpp with emulated tiles, on any machine with AVX2: slow, for tests.
#include "lanes_avx2.h"
#include "product_amx.h"

namespace fly {

const Kernels* amx_emulated_kernels() {
    static const Kernels table = with_tiles<EmulatedTiles, avx2_kernels>("amx_emulated");
    return &table;
}

}  // namespace fly
