// 32-bit sums in AVX2 registers, for product.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fly {
namespace {

struct Registers256 {
    using Register = __m256i;

    static Register zero() { return _mm256_setzero_si256(); }
    static Register load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Register every(int32_t four) { return _mm256_set1_epi32(four); }
    static void store(int32_t* p, Register sums) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), sums); }
};

}  // namespace
}  // namespace fly
