// Logits as the kernels see them: 16-byte vectors of 32-bit words that hold one float32 or a pair of 16-bit elements.
//
// Pairs stay packed as long as possible: maximum and minimum of two 16-bit elements are one instruction, and a chunk
// of the vocabulary takes half the registers. Reading is done here as well, for rows of any alignment.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace fly::entropy_gate {

template <typename To, typename From>
__device__ __forceinline__ To bitCast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// Each type says how its elements lie in a word and how two packed words are compared. larger() and smaller() ignore
// a NaN unless both operands are NaN; to anyEqual() a NaN is equal to nothing. filled() rounds to the nearest element. raised() keeps every NaN and lifts -inf
// to a finite value that is still far below kLowestMaximum, so that no sum meets 0 * -inf.
//
// A row's maximum lies between kLowestMaximum and kHighestMaximum, or it has no results. For float32 that bounds the
// rounding error of the maximum times log2 e by 32: it is an exponent that all terms have in common, and the results
// lose as many units in the last place. Nor do neighbours below kLowestMaximum count beside a maximum above it; they
// are 32 apart there, or more.
struct Float32 {
    using Element = uint32_t;
    using Packed = float;
    static constexpr int32_t kPerWord = 1;
    static constexpr uint32_t kNegativeInfinities = 0xff800000u;
    static constexpr float kLowestMaximum = -5e8f;
    static constexpr float kHighest = 3.4e38f;  // no finite element is far above it
    static __device__ __forceinline__ Packed larger(Packed a, Packed b) { return fmaxf(a, b); }
    static __device__ __forceinline__ Packed smaller(Packed a, Packed b) { return fminf(a, b); }
    static __device__ __forceinline__ Packed raised(Packed a) { return a < -8e37f ? -8e37f : a; }
    static __device__ __forceinline__ Packed filled(float value) { return value; }
    static __device__ __forceinline__ bool anyEqual(Packed a, Packed b) { return a == b; }
    static __device__ __forceinline__ float value(Packed packed, int32_t) { return packed; }
};

struct Float16 {
    using Element = uint16_t;
    using Packed = __half2;
    static constexpr int32_t kPerWord = 2;
    static constexpr uint32_t kNegativeInfinities = 0xfc00fc00u;
    static constexpr float kLowestMaximum = -6e4f;
    static constexpr float kHighest = 65504.0f;  // no finite element is far above it
    static __device__ __forceinline__ Packed larger(Packed a, Packed b) { return __hmax2(a, b); }
    static __device__ __forceinline__ Packed smaller(Packed a, Packed b) { return __hmin2(a, b); }
    static __device__ __forceinline__ Packed raised(Packed a) {
        return __hmax2_nan(a, bitCast<Packed>(0xfbfffbffu));  // -65504
    }
    static __device__ __forceinline__ Packed filled(float value) { return __float2half2_rn(value); }
    static __device__ __forceinline__ bool anyEqual(Packed a, Packed b) { return !__hbneu2(a, b); }
    static __device__ __forceinline__ float value(Packed packed, int32_t i) {
        return i == 0 ? __low2float(packed) : __high2float(packed);
    }
};

struct Bfloat16 {
    using Element = uint16_t;
    using Packed = __nv_bfloat162;
    static constexpr int32_t kPerWord = 2;
    static constexpr uint32_t kNegativeInfinities = 0xff80ff80u;
    static constexpr float kLowestMaximum = -5e8f;
    static constexpr float kHighest = 3.38e38f;  // no finite element is far above it
    static __device__ __forceinline__ Packed larger(Packed a, Packed b) { return __hmax2(a, b); }
    static __device__ __forceinline__ Packed smaller(Packed a, Packed b) { return __hmin2(a, b); }
    static __device__ __forceinline__ Packed raised(Packed a) {
        return __hmax2_nan(a, bitCast<Packed>(0xfe80fe80u));  // -2^126
    }
    static __device__ __forceinline__ Packed filled(float value) { return __float2bfloat162_rn(value); }
    static __device__ __forceinline__ bool anyEqual(Packed a, Packed b) { return !__hbneu2(a, b); }
    // The upper half of a float32; __high2float() takes an instruction more.
    static __device__ __forceinline__ float value(Packed packed, int32_t i) {
        uint32_t const word = bitCast<uint32_t>(packed);
        return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
    }
};

// The bits of the element nearest to a value.
template <typename Type>
__device__ __forceinline__ typename Type::Element element(float value) {
    return static_cast<typename Type::Element>(bitCast<uint32_t>(Type::filled(value)));
}

inline constexpr int32_t kWordsPerVector = 4;
inline constexpr int32_t kBytesPerVector = 16;

// Vector v of a row holds elements [v * kPerVector, (v + 1) * kPerVector), wherever the row begins in memory; past
// the end of the row it holds -inf, which contributes nothing to any result.
template <typename Type>
inline constexpr int32_t kPerVector = Type::kPerWord * kWordsPerVector;

template <typename Type>
struct Vector {
    uint32_t words[kWordsPerVector];
    __device__ __forceinline__ typename Type::Packed packed(int32_t word) const {
        return bitCast<typename Type::Packed>(words[word]);
    }
    // Ends the life of whatever was derived from the words. Without it the compiler keeps the elements it has
    // unpacked for one pass over them until the next one, twice the registers, and spills.
    __device__ __forceinline__ void forgetUnpacked() {
#pragma unroll
        for (uint32_t& word : words) asm volatile("" : "+r"(word));
    }
};

// The 16 bytes that begin `shift` bytes into two neighbouring aligned vectors. The shift is a multiple of the
// element's size below 16.
__device__ __forceinline__ void realign(uint4 first, uint4 second, uint32_t shift, uint32_t (&words)[4]) {
    uint32_t all[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int32_t i = 0; i < 6; ++i) all[i] = (shift & 8u) != 0 ? all[i + 2] : all[i];
#pragma unroll
    for (int32_t i = 0; i < 5; ++i) all[i] = (shift & 4u) != 0 ? all[i + 1] : all[i];
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) words[i] = __funnelshift_r(all[i], all[i + 1], (shift & 2u) * 8u);
}

// One row of logits in global memory, `size` elements from element `first` on.
template <typename Type>
class Row {
public:
    using Element = typename Type::Element;

    __device__ __forceinline__ Row(void const* logits, int64_t first, int32_t size)
        : elements_(static_cast<Element const*>(logits) + first), size_(size) {
        auto const address = reinterpret_cast<uintptr_t>(elements_);
        shift_ = static_cast<uint32_t>(address % kBytesPerVector);
        aligned_ = reinterpret_cast<uint4 const*>(address - shift_);
        int64_t const numBytes = static_cast<int64_t>(size) * static_cast<int64_t>(sizeof(Element));
        // Only 16-byte words that lie inside the row are loaded whole.
        wholeBegin_ = shift_ == 0 ? 0 : 1;
        int64_t const wholeEnd = (numBytes + shift_) / kBytesPerVector - wholeBegin_;
        wholeEnd_ = wholeEnd > wholeBegin_ ? static_cast<int32_t>(wholeEnd) : wholeBegin_;
    }

    __device__ __forceinline__ int32_t size() const { return size_; }

    // Loads vectors begin, begin + stride, ... into `vectors`; all loads are in flight before the first is used.
    // `isInside` says that the row has all of these vectors, which spares most chunks of an aligned row every check.
    template <int32_t kCount>
    __device__ __forceinline__ void load(
        int32_t begin, int32_t stride, bool isInside, Vector<Type> (&vectors)[kCount]) const {
        if (shift_ == 0 && isInside) {
            loadInside(begin, stride, vectors);
            return;
        }
        if (shift_ == 0) {
            loadAligned(begin, stride, vectors);
        } else {
            loadShifted(begin, stride, vectors);
        }
        loadEdges(begin, stride, vectors);
    }

    // For one element whose use is far away: any load but a volatile one would be moved down to its use.
    __device__ __forceinline__ float valueNow(int64_t index) const {
#ifdef __CUDA_ARCH__
        uint32_t const word = *static_cast<Element const volatile*>(elements_ + index);
#else
        uint32_t const word = __ldg(elements_ + index);
#endif
        return Type::value(bitCast<typename Type::Packed>(word), 0);
    }

private:
    static __device__ __forceinline__ uint4 negativeInfinities() {
        constexpr uint32_t kWord = Type::kNegativeInfinities;
        return make_uint4(kWord, kWord, kWord, kWord);
    }

    template <int32_t kCount>
    __device__ __forceinline__ void loadInside(int32_t begin, int32_t stride, Vector<Type> (&vectors)[kCount]) const {
#pragma unroll
        for (int32_t i = 0; i < kCount; ++i) {
            uint4 const raw = __ldcs(aligned_ + begin + i * stride);  // read once: first to leave the caches
            vectors[i] = {{raw.x, raw.y, raw.z, raw.w}};
        }
    }

    template <int32_t kCount>
    __device__ __forceinline__ void loadAligned(int32_t begin, int32_t stride, Vector<Type> (&vectors)[kCount]) const {
#pragma unroll
        for (int32_t i = 0; i < kCount; ++i) {
            int32_t const v = begin + i * stride;
            uint4 raw = negativeInfinities();
            if (v < wholeEnd_) raw = __ldcs(aligned_ + v);
            vectors[i] = {{raw.x, raw.y, raw.z, raw.w}};
        }
    }

    // A vector of a row that does not start on 16 bytes lies across two aligned words. Each is loaded by two threads,
    // the second time from the L1 cache. So the place of an element among the threads, and with it the order of every
    // sum, is the same for all alignments: rows of an odd vocabulary do not depend on their place in the batch.
    template <int32_t kCount>
    __device__ __forceinline__ void loadShifted(int32_t begin, int32_t stride, Vector<Type> (&vectors)[kCount]) const {
        constexpr int32_t kInFlight = 4;
        static_assert(kCount % kInFlight == 0, "vectors are shifted in groups");
#pragma unroll
        for (int32_t group = 0; group < kCount; group += kInFlight) {
            uint4 pairs[kInFlight][2];
#pragma unroll
            for (int32_t i = 0; i < kInFlight; ++i) {
                int32_t const v = begin + (group + i) * stride;
                pairs[i][0] = pairs[i][1] = negativeInfinities();
                if (v >= wholeBegin_ && v < wholeEnd_) {
                    pairs[i][0] = __ldg(aligned_ + v);
                    pairs[i][1] = __ldg(aligned_ + v + 1);
                }
            }
#pragma unroll
            for (int32_t i = 0; i < kInFlight; ++i) {
                realign(pairs[i][0], pairs[i][1], shift_, vectors[group + i].words);
            }
        }
    }

    // The first vector of a shifted row and up to two at the end, element by element, by the threads that hold them.
    template <int32_t kCount>
    __device__ __forceinline__ void loadEdges(int32_t begin, int32_t stride, Vector<Type> (&vectors)[kCount]) const {
        int32_t const numVectors = (size_ + kPerVector<Type> - 1) / kPerVector<Type>;
        int32_t const numEdges = wholeBegin_ + numVectors - wholeEnd_;
#pragma unroll 1
        for (int32_t edge = 0; edge < numEdges; ++edge) {
            int32_t const v = edge < wholeBegin_ ? edge : wholeEnd_ + edge - wholeBegin_;
            int32_t const offset = v - begin;
            if (offset < 0 || offset % stride != 0 || offset / stride >= kCount) continue;
            Vector<Type> const loaded = elementwise(v);
#pragma unroll
            for (int32_t i = 0; i < kCount; ++i) {
                if (i * stride == offset) vectors[i] = loaded;
            }
        }
    }

    __device__ __forceinline__ Vector<Type> elementwise(int32_t v) const {
        constexpr uint32_t kBits = 8 * sizeof(Element);
        Vector<Type> vector{};
        // Elements are pushed in at the bottom, the last one first. Rarely used, so small before fast.
#pragma unroll 1
        for (int32_t i = kPerVector<Type> - 1; i >= 0; --i) {
            int32_t const index = v * kPerVector<Type> + i;
            uint32_t element = Type::kNegativeInfinities >> (32 - kBits);
            if (index < size_) element = __ldg(elements_ + index);
#pragma unroll
            for (int32_t word = kWordsPerVector - 1; word > 0; --word) {
                vector.words[word] = kBits == 32
                    ? vector.words[word - 1]
                    : __funnelshift_l(vector.words[word - 1], vector.words[word], kBits);
            }
            vector.words[0] = kBits == 32 ? element : __funnelshift_l(element << (32 - kBits), vector.words[0], kBits);
        }
        return vector;
    }

    Element const* elements_;
    uint4 const* aligned_;  // the 16-byte word in which the row begins
    int32_t size_;
    uint32_t shift_;      // bytes of that word that come before the row
    int32_t wholeBegin_;  // vectors [wholeBegin_, wholeEnd_) are made of words inside the row
    int32_t wholeEnd_;
};

}  // namespace fly::entropy_gate
