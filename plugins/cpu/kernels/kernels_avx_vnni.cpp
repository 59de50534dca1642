// AVX2 with VNNI, of client CPUs: one instruction multiplies and adds 32 pairs of 8 bits.
#include "lanes_avx2.h"
#include "product.h"
#include "registers_avx2.h"

namespace fly {
namespace {

struct AvxVnni : Registers256 {
    static constexpr size_t kRows = 6, kBlocks = 1;  // 12 of 16 registers hold sums

    static Register add_products(Register sums, Register weights, Register row) {
        return _mm256_dpbusd_avx_epi32(sums, weights, row);
    }
};

}  // namespace

const Kernels* avx_vnni_kernels() {
    static const Kernels table = [] {
        Kernels kernels = *avx2_kernels();
        kernels.name = "avx_vnni";
        kernels.row_layout = Product<AvxVnni>::layout;
        kernels.multiply = Product<AvxVnni>::multiply;
        return kernels;
    }();
    return &table;
}

}  // namespace fly
