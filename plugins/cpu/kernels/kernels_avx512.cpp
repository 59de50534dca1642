// AVX-512 with its byte, word and double word instructions.
#include "lanes_avx512.h"
#include "product.h"
#include "quantize.h"
#include "read_logits.h"
#include "registers_avx512.h"

namespace fly {
namespace {

struct Avx512 : Registers512 {
    // Two products fit in 16 bits: see kernels_avx2.cpp.
    static Register add_products(Register sums, Register weights, Register row) {
        const Register pairs = _mm512_maddubs_epi16(weights, row);
        return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
};

}  // namespace

const Kernels* avx512_kernels() {
    static const Kernels table = {"avx512",          Product<Avx512>::kTaskBlocks, Product<Avx512>::layout,
                                  quantize_row,      Product<Avx512>::multiply,    read_logits,
                                  avx512_attention()};
    return &table;
}

}  // namespace fly
