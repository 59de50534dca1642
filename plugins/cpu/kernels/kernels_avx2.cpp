// AVX2, FMA and F16C: what any x86-64 machine has that fly-trt's own kernels run on.
#include "lanes_avx2.h"
#include "product.h"
#include "quantize.h"
#include "read_logits.h"
#include "registers_avx2.h"

namespace fly {
namespace {

struct Avx2 : Registers256 {
    static constexpr size_t kRows = 4, kBlocks = 1;

    // Two products fit in 16 bits, since weights are 0..128 and rows -127..127: 2 * 128 * 127 < 2^15.
    static Register add_products(Register sums, Register weights, Register row) {
        const Register pairs = _mm256_maddubs_epi16(weights, row);
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

}  // namespace

const Kernels* avx2_kernels() {
    static const Kernels table = {"avx2",          Product<Avx2>::kTaskBlocks, Product<Avx2>::layout,
                                  quantize_row,    Product<Avx2>::multiply,    read_logits,
                                  avx2_attention()};
    return &table;
}

}  // namespace fly
