// 16 floats side by side, in one AVX-512 register. lanes_avx2.h has the same names.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace fly {
namespace {

struct Lanes {
    __m512 v;

    static Lanes zero() { return {_mm512_setzero_ps()}; }
    static Lanes all(float x) { return {_mm512_set1_ps(x)}; }
    static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Lanes of_integers(const int32_t* p, int32_t less) {
        return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(less)))};
    }
    static Lanes load(const Half* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    // The first n, zeros behind them.
    static Lanes load(const float* p, size_t n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    // Rounded to the nearest, ties to even.
    void store(Half* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    void store(float* p, size_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }

    static __mmask16 mask(size_t n) { return static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1U << n) - 1); }
};

inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes magnitude(Lanes a) { return {_mm512_abs_ps(a.v)}; }
inline Lanes rounded(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2 to the power of whole numbers n in -127..127, as which -127 gives 0.
inline Lanes power_of_two(Lanes n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline Lanes times_power_of_two(Lanes x, Lanes n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// Whether one of them is not finite.
inline bool any_not_finite(Lanes a) { return _mm512_fpclass_ps_mask(a.v, 0x99) != 0; }
// Whether a is more than b anywhere.
inline bool any_greater(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }

// In the order ((l0 + l8) + (l4 + l12)) + ..., the same as in lanes_avx2.h.
inline __m256 halves_low(Lanes a) { return _mm512_castps512_ps256(a.v); }
inline __m256 halves_high(Lanes a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)); }

// 16 whole numbers of 32 bits.
struct Integers {
    __m512i v;

    static Integers zero() { return {_mm512_setzero_si512()}; }
    // To the nearest, ties to even.
    static Integers rounded(Lanes a) { return {_mm512_cvtps_epi32(a.v)}; }
    static Integers bits(Lanes a) { return {_mm512_castps_si512(a.v)}; }
    // Those within -128..127.
    __m128i bytes() const { return _mm512_cvtepi32_epi8(v); }
};

inline Integers operator+(Integers a, Integers b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Integers max(Integers a, Integers b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline __m256i halves_low(Integers a) { return _mm512_castsi512_si256(a.v); }
inline __m256i halves_high(Integers a) { return _mm512_extracti64x4_epi64(a.v, 1); }

}  // namespace
}  // namespace fly

#include "lanes_reduce.h"
