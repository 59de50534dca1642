// 16 floats side by side, in two AVX2 registers. lanes_avx512.h has the same names.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention.h"

namespace fly {
namespace {

struct Lanes {
    __m256 low, high;

    static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Lanes of_integers(const int32_t* p, int32_t less) { return {floats(p, less), floats(p + 8, less)}; }
    static Lanes load(const Half* p) {
        const auto* eight = reinterpret_cast<const __m128i*>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(eight)), _mm256_cvtph_ps(_mm_loadu_si128(eight + 1))};
    }
    // The first n, zeros behind them.
    static Lanes load(const float* p, size_t n) {
        if (n >= 16) return load(p);
        float padded[16] = {};
        std::memcpy(padded, p, n * sizeof(float));
        return load(padded);
    }
    void store(float* p) const {
        _mm256_storeu_ps(p, low);
        _mm256_storeu_ps(p + 8, high);
    }
    // Rounded to the nearest, ties to even.
    void store(Half* p) const {
        auto* eight = reinterpret_cast<__m128i*>(p);
        _mm_storeu_si128(eight, _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(eight + 1, _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
    }
    void store(float* p, size_t n) const {
        if (n >= 16) return store(p);
        float whole[16];
        store(whole);
        std::memcpy(p, whole, n * sizeof(float));
    }

   private:
    static __m256 floats(const int32_t* p, int32_t less) {
        const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(eight, _mm256_set1_epi32(less)));
    }
};

inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline __m256 without_sign(__m256 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), a); }
inline Lanes magnitude(Lanes a) { return {without_sign(a.low), without_sign(a.high)}; }
inline Lanes rounded(Lanes a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}
// 2 to the power of whole numbers n in -127..127, as which -127 gives 0.
inline __m256 power_of_two(__m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Lanes power_of_two(Lanes n) { return {power_of_two(n.low), power_of_two(n.high)}; }
inline Lanes times_power_of_two(Lanes x, Lanes n) { return x * power_of_two(n); }
// Whether one of them is not finite.
inline bool any_not_finite(Lanes a) {
    const __m256 most = _mm256_set1_ps(3.4028234664e38F);
    const __m256 is_low = _mm256_cmp_ps(without_sign(a.low), most, _CMP_NLE_UQ);
    const __m256 is_high = _mm256_cmp_ps(without_sign(a.high), most, _CMP_NLE_UQ);
    return _mm256_movemask_ps(_mm256_or_ps(is_low, is_high)) != 0;
}

// Whether a is more than b anywhere.
inline bool any_greater(Lanes a, Lanes b) {
    const __m256 is_low = _mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), is_high = _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ);
    return _mm256_movemask_ps(_mm256_or_ps(is_low, is_high)) != 0;
}

inline __m256 halves_low(Lanes a) { return a.low; }
inline __m256 halves_high(Lanes a) { return a.high; }

// 16 whole numbers of 32 bits.
struct Integers {
    __m256i low, high;

    static Integers zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    // To the nearest, ties to even.
    static Integers rounded(Lanes a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
    static Integers bits(Lanes a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
    // Those within -128..127.
    __m128i bytes() const {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
        return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }
};

inline Integers operator+(Integers a, Integers b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline Integers max(Integers a, Integers b) {
    return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)};
}
inline __m256i halves_low(Integers a) { return a.low; }
inline __m256i halves_high(Integers a) { return a.high; }

}  // namespace
}  // namespace fly

#include "lanes_reduce.h"
