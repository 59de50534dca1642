// AMX-INT8 beside AVX-512 with VNNI: one instruction multiplies and adds 16,384 pairs of 8 bits.
#include "lanes_avx512.h"
#include "product_amx.h"

namespace fly {

const Kernels* amx_kernels() {
    static const Kernels table = with_tiles<ProcessorTiles, avx512_vnni_kernels>("amx");
    return &table;
}

}  // namespace fly
