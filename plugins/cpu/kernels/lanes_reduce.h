// From 16 lanes to one number, in one order for every kind of lanes, and exponentials. Included by lanes_*.h.
#pragma once

namespace fly {
namespace {

inline float sum(Lanes a) {
    const __m256 eight = _mm256_add_ps(halves_low(a), halves_high(a));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest(Lanes a) {
    const __m256 eight = _mm256_max_ps(halves_low(a), halves_high(a));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline float first_of(Lanes a) { return _mm256_cvtss_f32(halves_low(a)); }

inline int32_t sum(Integers a) {
    const __m256i eight = _mm256_add_epi32(halves_low(a), halves_high(a));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}

inline int32_t largest(Integers a) {
    const __m256i eight = _mm256_max_epi32(halves_low(a), halves_high(a));
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    const int32_t first = _mm_cvtsi128_si32(two), second = _mm_extract_epi32(two, 1);
    return first > second ? first : second;
}

// exp(x) within 2 units in the last place; 0 from kNoPower down, and above 88.376 what it is there.
constexpr float kNoPower = -88.0F;  // n is -127, whose power of two has no bits
inline Lanes exponential(Lanes x) {
    const Lanes bounded = max(min(x, Lanes::all(88.3762626647949F)), Lanes::all(kNoPower));
    const Lanes n = rounded(bounded * Lanes::all(1.44269504088896341F));
    // x - n ln 2, with ln 2 in two parts.
    const Lanes r = fma(n, Lanes::all(2.12194440054690583e-4F), fma(n, Lanes::all(-0.693359375F), bounded));
    Lanes p = Lanes::all(1.0F / 5040);
    p = fma(p, r, Lanes::all(1.0F / 720));
    p = fma(p, r, Lanes::all(1.0F / 120));
    p = fma(p, r, Lanes::all(1.0F / 24));
    p = fma(p, r, Lanes::all(1.0F / 6));
    p = fma(p, r, Lanes::all(0.5F));
    p = fma(p, r, Lanes::all(1.0F));
    p = fma(p, r, Lanes::all(1.0F));
    return p * power_of_two(n);
}

// 2^x for x in -126..127 within 2 units in the last place, exactly 1 for 0. What is not a number stays so.
inline Lanes power_of_two_near_zero(Lanes x) {
    const Lanes n = rounded(x), r = x - n;
    Lanes p = Lanes::all(1.54614447e-4F);
    p = fma(p, r, Lanes::all(1.34004282e-3F));
    p = fma(p, r, Lanes::all(9.61805668e-3F));
    p = fma(p, r, Lanes::all(5.55032723e-2F));
    p = fma(p, r, Lanes::all(2.40226509e-1F));
    p = fma(p, r, Lanes::all(6.93147207e-1F));
    p = fma(p, r, Lanes::all(1.0F));
    return times_power_of_two(p, n);
}

// The same for x of 0 or less, from 2^-80 on: beside a weight of 1 that is nothing, while products with much smaller
// numbers would be slow. max returns its second operand where one is not a number.
inline Lanes small_power_of_two(Lanes x) { return power_of_two_near_zero(max(Lanes::all(-80.0F), x)); }

}  // namespace
}  // namespace fly
