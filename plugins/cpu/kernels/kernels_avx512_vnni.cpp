// AVX-512 with VNNI: one instruction multiplies and adds 64 pairs of 8 bits.
#include "lanes_avx512.h"
#include "product.h"
#include "registers_avx512.h"

namespace fly {
namespace {

struct Avx512Vnni : Registers512 {
    static Register add_products(Register sums, Register weights, Register row) {
        return _mm512_dpbusd_epi32(sums, weights, row);
    }
};

}  // namespace

const Kernels* avx512_vnni_kernels() {
    static const Kernels table = [] {
        Kernels kernels = *avx512_kernels();
        kernels.name = "avx512_vnni";
        kernels.row_layout = Product<Avx512Vnni>::layout;
        kernels.multiply = Product<Avx512Vnni>::multiply;
        return kernels;
    }();
    return &table;
}

}  // namespace fly
