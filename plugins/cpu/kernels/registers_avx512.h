// 32-bit sums in AVX-512 registers, for product.h.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace fly {
namespace {

struct Registers512 {
    using Register = __m512i;
    static constexpr size_t kRows = 8, kBlocks = 3;  // 24 of 32 registers hold sums

    static Register zero() { return _mm512_setzero_si512(); }
    static Register load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Register every(int32_t four) { return _mm512_set1_epi32(four); }
    static void store(int32_t* p, Register sums) { _mm512_storeu_si512(p, sums); }
};

}  // namespace
}  // namespace fly
