// What is known of a row of logits after one pass over it: one block reduces a chunk, then one warp merges the chunks.
//
// A chunk is what 128 threads hold in registers: eight 16-byte vectors each, all in flight at once, 16 KiB per block.
// That is small enough that 16 rows of 128,256 bfloat16 logits make 256 blocks and fill every SM of a large GPU, and
// large enough that reducing a chunk costs a small part of reading it. The chunks of a row, the thread of an element
// and the order of every sum follow from the vocabulary size and the type of the logits, never from the number of
// rows or a row's alignment. Hence the same row gives the same bits in any batch.
//
// With a chunk in registers the block's maximum m is known before the first exponential, so nothing is ever rescaled
// inside a block. With t = (x - m) log2 e, s = sum 2^t and w = sum 2^t t, the entropy is log2 s - w / s bits. That is
// one FFMA, one exponential, one FADD and one FFMA per element; whether a row has a softmax at all shows in s. Where
// w is NaN, which -inf makes it, a thread sums again with -inf raised to a finite number: only then, because a chunk
// is bound by the instructions it issues, and raising takes one more for every word.
//
// The largest k values are kept by a branch-free insertion into sorted lists of packed pairs: 2k - 1 instructions for
// a pair. Skipping by comparison with the k-th value would save little, since a thread sees only 64 elements and a
// warp all of the lists' early changes. Where the largest values of the chunk lie is looked up afterwards, one after
// the other, by the threads that hold them; only equal ones wait for each other, since the lower index is the first.
#pragma once

#include "logits.cuh"

#include <cmath>

namespace fly::entropy_gate {

inline constexpr int32_t kWarpSize = 32;
inline constexpr int32_t kThreads = 128;
inline constexpr int32_t kWarps = kThreads / kWarpSize;
inline constexpr int32_t kVectorsPerThread = 8;
inline constexpr int32_t kVectorsPerChunk = kThreads * kVectorsPerThread;
// Lists of 3 serve the authors' top-3 gate and less; longer ones cost registers and instructions.
inline constexpr int32_t kShortTop = 3;
// 64 or 72 registers, the fewest without spills, and 128 or 112 KiB of loads in flight per SM.
template <int32_t kTop>
inline constexpr int32_t kBlocksPerSm = kTop <= 4 ? 8 : 7;
inline constexpr uint32_t kAllLanes = 0xffffffffu;
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kHighestMaximum = 5e8f;  // see kLowestMaximum
// 2^x is 0 in float32 from here on. Bounding an exponent from below keeps 0 * -inf out of the merged sums.
inline constexpr float kLowestExponent = -1000.0f;
inline constexpr uint32_t kNoIndex = 0xffffffffu;

inline int32_t divideUp(int32_t dividend, int32_t divisor) { return (dividend + divisor - 1) / divisor; }

template <typename Type>
int32_t numChunksOf(int32_t vocabSize) {
    return divideUp(vocabSize, kPerVector<Type> * kVectorsPerChunk);
}

// What a block finds in its chunk. `peak` is the chunk's maximum and `index` its first index, or a NaN and its first
// index; the sums are relative to the maximum. `top` holds the largest values in falling order, filled up with -inf,
// and `places` their indices, in rising order among equals. Where the chunk holds a NaN, places mean nothing. It is
// made of whole 16-byte words, so that results are written and read in few instructions and without padding.
template <int32_t kTop>
struct alignas(16) ChunkResult {
    static constexpr int32_t kStored = (kTop + 3) / 4 * 4;
    float peak;
    float sum;
    float weighted;
    uint32_t index;
    float top[kStored];
    uint32_t places[kStored];
};

__device__ __forceinline__ float negativeInfinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float positiveInfinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float notANumber() { return __uint_as_float(0x7fc00000u); }

// 2^x to a few units in the last place; 0 below -126.
__device__ __forceinline__ float fastExp2(float x) {
#ifdef __CUDA_ARCH__
    // exp2f() would guard results below 2^-126, which are zero here, with three more instructions.
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// What exponents are relative to, in units of log2. It is this rounded product on both sides of every subtraction, so
// its rounding cancels where it is small enough to be an exponent. A maximum too low to be told from the values that
// mask logits contributes nothing.
template <typename Type>
__device__ __forceinline__ float reference(float maximum) {
    return maximum < Type::kLowestMaximum ? 0.0f : maximum * kLog2E;
}

// Unsigned integers in the order of the floats; -0 counts as +0 and a positive NaN is above everything.
__device__ __forceinline__ uint32_t orderedKey(float value) {
    uint32_t const bits = __float_as_uint(value + 0.0f);
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float keyValue(uint32_t key) {
    return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ float warpSum(float value) {
#pragma unroll
    for (int32_t distance = kWarpSize / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, distance);
    }
    return value;
}

template <typename Type, int32_t kTop>
__device__ __forceinline__ void insert(typename Type::Packed (&top)[kTop], typename Type::Packed value) {
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) {
        typename Type::Packed const smaller = Type::smaller(top[i], value);
        top[i] = Type::larger(top[i], value);
        value = smaller;
    }
}

// Replaces the lanes' sorted lists by the sorted list of the largest values of all lanes.
template <int32_t kTop>
__device__ __forceinline__ void warpTop(float (&top)[kTop], int32_t lane) {
    float result[kTop];
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) {
        uint32_t const key = orderedKey(top[0]);
        uint32_t const largest = __reduce_max_sync(kAllLanes, key);
        uint32_t const holders = __ballot_sync(kAllLanes, key == largest);
        result[i] = keyValue(largest);
        if (lane == __ffs(static_cast<int>(holders)) - 1) {
#pragma unroll
            for (int32_t j = 0; j + 1 < kTop; ++j) top[j] = top[j + 1];
            top[kTop - 1] = negativeInfinity();
        }
    }
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) top[i] = result[i];
}

// Takes a value and its place into a list that falls by value, and rises by place among equals.
template <int32_t kTop>
__device__ __forceinline__ void insertPlaced(
    float (&top)[kTop], uint32_t (&places)[kTop], float value, uint32_t place) {
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) {
        bool const comesFirst = value > top[i] || (value == top[i] && place < places[i]);
        float const nextValue = comesFirst ? top[i] : value;
        uint32_t const nextPlace = comesFirst ? places[i] : place;
        top[i] = comesFirst ? value : top[i];
        places[i] = comesFirst ? place : places[i];
        value = nextValue;
        place = nextPlace;
    }
}

// The same as warpTop for lists with places; among equals the lower place comes first.
template <int32_t kTop>
__device__ __forceinline__ void warpTopPlaced(float (&top)[kTop], uint32_t (&places)[kTop]) {
    float result[kTop];
    uint32_t resultPlaces[kTop];
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) {
        uint32_t const key = orderedKey(top[0]);
        uint32_t const largest = __reduce_max_sync(kAllLanes, key);
        uint32_t const place = __reduce_min_sync(kAllLanes, key == largest ? places[0] : kNoIndex);
        result[i] = keyValue(largest);
        resultPlaces[i] = place;
        if (key == largest && places[0] == place) {
#pragma unroll
            for (int32_t j = 0; j + 1 < kTop; ++j) {
                top[j] = top[j + 1];
                places[j] = places[j + 1];
            }
            top[kTop - 1] = negativeInfinity();
            places[kTop - 1] = kNoIndex;
        }
    }
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) {
        top[i] = result[i];
        places[i] = resultPlaces[i];
    }
}

template <typename Type, int32_t kTop>
__device__ __forceinline__ void threadTop(Vector<Type> const (&vectors)[kVectorsPerThread], float (&top)[kTop]) {
    typename Type::Packed packed[kTop];
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) packed[i] = bitCast<typename Type::Packed>(Type::kNegativeInfinities);
#pragma unroll
    for (int32_t v = 0; v < kVectorsPerThread; ++v) {
#pragma unroll
        for (int32_t word = 0; word < kWordsPerVector; ++word) insert<Type>(packed, vectors[v].packed(word));
    }
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) top[i] = Type::value(packed[i], 0);
    if constexpr (Type::kPerWord == 2) {
#pragma unroll
        for (int32_t i = 0; i < kTop; ++i) insert<Float32>(top, Type::value(packed[i], 1));
    }
}

// The first index behind `after` at which a thread holds `wanted`, or kNoIndex. Every index is behind kNoIndex.
template <typename Type>
__device__ __forceinline__ uint32_t nextIndex(
    Vector<Type> const (&vectors)[kVectorsPerThread], uint32_t firstVector, float wanted, uint32_t after) {
    typename Type::Packed const wantedPacked = Type::filled(wanted);
    uint32_t const first = firstVector * kPerVector<Type>;
    // Counted from the first element, so that the candidates are constants.
    int32_t const behind = after == kNoIndex ? -1 : static_cast<int32_t>(after - first);
    uint32_t place = kNoIndex;
#pragma unroll
    for (int32_t v = kVectorsPerThread - 1; v >= 0; --v) {
#pragma unroll
        for (int32_t word = kWordsPerVector - 1; word >= 0; --word) {
            typename Type::Packed const packed = vectors[v].packed(word);
            if (!Type::anyEqual(packed, wantedPacked)) continue;
#pragma unroll
            for (int32_t i = Type::kPerWord - 1; i >= 0; --i) {
                int32_t const candidate = v * kThreads * kPerVector<Type> + word * Type::kPerWord + i;
                bool const isNext = Type::value(packed, i) == wanted && candidate > behind;
                if (isNext) place = static_cast<uint32_t>(candidate);
            }
        }
    }
    return place == kNoIndex ? kNoIndex : first + place;
}

// The first index at which a thread holds a NaN, or kNoIndex.
template <typename Type>
__device__ __forceinline__ uint32_t firstNan(
    Vector<Type> const (&vectors)[kVectorsPerThread], uint32_t firstVector) {
    uint32_t place = kNoIndex;  // counted as above
#pragma unroll
    for (int32_t v = kVectorsPerThread - 1; v >= 0; --v) {
#pragma unroll
        for (int32_t i = kPerVector<Type> - 1; i >= 0; --i) {
            float const value = Type::value(vectors[v].packed(i / Type::kPerWord), i % Type::kPerWord);
            if (value != value) place = static_cast<uint32_t>(v * kThreads * kPerVector<Type> + i);
        }
    }
    return place == kNoIndex ? kNoIndex : firstVector * kPerVector<Type> + place;
}

// The sums over a thread's elements. Without kRaise they are NaN if -inf or something near it is among the elements.
template <bool kRaise, typename Type>
__device__ __forceinline__ void threadSums(
    Vector<Type> const (&vectors)[kVectorsPerThread], float subtrahend, float& sum, float& weighted) {
    sum = 0.0f;
    weighted = 0.0f;
#pragma unroll
    for (int32_t v = 0; v < kVectorsPerThread; ++v) {
#pragma unroll
        for (int32_t word = 0; word < kWordsPerVector; ++word) {
            typename Type::Packed packed = vectors[v].packed(word);
            if constexpr (kRaise) packed = Type::raised(packed);
#pragma unroll
            for (int32_t i = 0; i < Type::kPerWord; ++i) {
                float const exponent = fmaf(Type::value(packed, i), kLog2E, -subtrahend);
                float const term = fastExp2(exponent);  // NaN for a NaN and for +inf, and so is the sum
                sum += term;
                weighted = fmaf(term, exponent, weighted);
            }
        }
    }
}

// One block reduces one chunk of a row.
template <typename Type, int32_t kTop>
__device__ __forceinline__ void reduceChunk(Row<Type> const& row, int32_t chunk, ChunkResult<kTop>& found) {
    __shared__ float warpTops[kWarps][kTop];
    __shared__ float blockTops[kWarps][kTop];  // the block's list, once for each warp, so that none waits for another
    __shared__ uint32_t places[kTop];
    __shared__ float warpSums[kWarps];
    __shared__ float warpWeighted[kWarps];
    __shared__ uint32_t warpNans[kWarps];

    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const warp = thread / kWarpSize;
    int32_t const lane = thread % kWarpSize;
    int32_t const firstVector = chunk * kVectorsPerChunk + thread;
    bool const isInside = (chunk + 1) * kVectorsPerChunk * kPerVector<Type> <= row.size();

    Vector<Type> vectors[kVectorsPerThread];
    row.load(firstVector, kThreads, isInside, vectors);

    float own[kTop];
    float top[kTop];
    threadTop<Type>(vectors, own);
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) top[i] = own[i];
    warpTop(top, lane);
    if (lane == 0) {
#pragma unroll
        for (int32_t i = 0; i < kTop; ++i) warpTops[warp][i] = top[i];
    }
    if (thread < kTop) places[thread] = kNoIndex;
    __syncthreads();
#pragma unroll
    for (int32_t v = 0; v < kVectorsPerThread; ++v) vectors[v].forgetUnpacked();

#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) top[i] = lane < kWarps ? warpTops[lane][i] : negativeInfinity();
    warpTop(top, lane);
    if (lane == 0) {
#pragma unroll
        for (int32_t i = 0; i < kTop; ++i) blockTops[warp][i] = top[i];
    }
    __syncwarp();
    float const blockMax = top[0];
    uint32_t held = 0;  // bit r: the thread holds the value of rank r, which is then among its own r + 1 largest
#pragma unroll
    for (int32_t rank = 0; rank < kTop; ++rank) {
#pragma unroll
        for (int32_t i = 0; i <= rank; ++i) held |= own[i] == top[rank] ? 1u << rank : 0u;
    }
#pragma unroll 1
    for (int32_t rank = 0; rank < kTop; ++rank) {
#pragma unroll
        for (int32_t v = 0; v < kVectorsPerThread; ++v) vectors[v].forgetUnpacked();
        float const wanted = blockTops[warp][rank];
        bool const isRepeated = rank > 0 && wanted == blockTops[warp][rank - 1];  // in all threads or in none
        if (isRepeated) __syncthreads();
        uint32_t place = kNoIndex;
        if ((held >> rank & 1u) != 0) {
            uint32_t const after = isRepeated ? places[rank - 1] : kNoIndex;
            place = nextIndex(vectors, static_cast<uint32_t>(firstVector), wanted, after);
        }
        place = __reduce_min_sync(kAllLanes, place);
        if (lane == 0 && place != kNoIndex) atomicMin(&places[rank], place);
    }
#pragma unroll
    for (int32_t v = 0; v < kVectorsPerThread; ++v) vectors[v].forgetUnpacked();

    float const subtrahend = reference<Type>(blockMax);
    // Past the end of a row is -inf; elsewhere it is rare enough to be found by its result.
    float sum = 0.0f;
    float weighted = notANumber();
    if (isInside) threadSums<false>(vectors, subtrahend, sum, weighted);
    if (weighted != weighted) {
#pragma unroll
        for (int32_t v = 0; v < kVectorsPerThread; ++v) vectors[v].forgetUnpacked();
        threadSums<true>(vectors, subtrahend, sum, weighted);
    }
#pragma unroll
    for (int32_t v = 0; v < kVectorsPerThread; ++v) vectors[v].forgetUnpacked();
    uint32_t nan = kNoIndex;
    if (sum != sum) nan = firstNan(vectors, static_cast<uint32_t>(firstVector));
    sum = warpSum(sum);
    weighted = warpSum(weighted);
    nan = __reduce_min_sync(kAllLanes, nan);
    if (lane == 0) {
        warpSums[warp] = sum;
        warpWeighted[warp] = weighted;
        warpNans[warp] = nan;
    }
    __syncthreads();
    if (thread != 0) return;

#pragma unroll
    for (int32_t i = 1; i < kWarps; ++i) {
        sum += warpSums[i];
        weighted += warpWeighted[i];
        nan = min(nan, warpNans[i]);
    }
    ChunkResult<kTop> result;
    result.peak = nan == kNoIndex ? blockMax : notANumber();
    result.sum = sum;
    result.weighted = weighted;
    result.index = nan == kNoIndex ? places[0] : nan;
#pragma unroll
    for (int32_t i = 0; i < ChunkResult<kTop>::kStored; ++i) {
        result.top[i] = i < kTop ? blockTops[0][i] : negativeInfinity();
        result.places[i] = i < kTop ? places[i] : kNoIndex;
    }
    found = result;
}

// What a row's chunks are together.
template <int32_t kTop>
struct MergedRow {
    bool hasNan;
    uint32_t index;   // the first index of the maximum, or of a NaN
    float top[kTop];  // the largest values in falling order, the maximum first
    uint32_t places[kTop];
    float logNorm;  // of the softmax, relative to the maximum, nats; NaN where there is no softmax
    float entropy;  // nats

    __device__ __forceinline__ float logProbability(int32_t rank) const { return top[rank] - top[0] - logNorm; }

    // The sum over the largest `topK` probabilities, nats.
    __device__ __forceinline__ float entropyOfTop(int32_t topK) const {
        float sum = 0.0f;
#pragma unroll
        for (int32_t i = 0; i < kTop; ++i) {
            float const logProb = logProbability(i);
            if (i < topK) sum -= fastExp2(logProb * kLog2E) * fmaxf(logProb, kLowestExponent);
        }
        return sum;
    }
};

// One warp merges the chunks of a row; lane l takes chunks l, l + 32, ... All lanes get the same.
template <typename Type, int32_t kTop>
__device__ __forceinline__ MergedRow<kTop> mergeRow(
    ChunkResult<kTop> const* chunks, int32_t numChunks, int32_t lane) {
    float peak = negativeInfinity();  // NaN as soon as there is one
    uint32_t index = kNoIndex;
    MergedRow<kTop> merged;
    float (&top)[kTop] = merged.top;
    uint32_t (&places)[kTop] = merged.places;
#pragma unroll
    for (int32_t i = 0; i < kTop; ++i) {
        top[i] = negativeInfinity();
        places[i] = kNoIndex;
    }
    for (int32_t chunk = lane; chunk < numChunks; chunk += kWarpSize) {
        ChunkResult<kTop> const result = chunks[chunk];  // a copy: all of it is on its way before any is looked at
        if (index == kNoIndex || orderedKey(result.peak) > orderedKey(peak)) {
            peak = result.peak;
            index = result.index;
        }
#pragma unroll
        for (int32_t i = 0; i < kTop; ++i) insertPlaced(top, places, result.top[i], result.places[i]);
    }
    uint32_t const peakKey = orderedKey(peak);
    uint32_t const highestKey = __reduce_max_sync(kAllLanes, peakKey);
    merged.index = __reduce_min_sync(kAllLanes, peakKey == highestKey ? index : kNoIndex);
    merged.hasNan = highestKey > orderedKey(positiveInfinity());
    warpTopPlaced(top, places);

    float const maximum = top[0];
    float const subtrahend = reference<Type>(maximum);
    float sum = 0.0f;
    float weighted = 0.0f;
    for (int32_t chunk = lane; chunk < numChunks; chunk += kWarpSize) {
        ChunkResult<kTop> const& result = chunks[chunk];
        float const difference = reference<Type>(result.top[0]) - subtrahend;
        float const exponent = fminf(fmaxf(difference, kLowestExponent), 0.0f);
        float const scale = fastExp2(exponent);
        sum = fmaf(result.sum, scale, sum);
        weighted = fmaf(fmaf(result.sum, exponent, result.weighted), scale, weighted);
    }
    sum = warpSum(sum);
    weighted = warpSum(weighted);

    // The sum is not above 0 if there is a NaN. +inf and a row of nothing but -inf are beyond the maximum's limits.
    bool const hasSoftmax = sum > 0.0f && maximum >= Type::kLowestMaximum && maximum <= kHighestMaximum;
    float const log2Sum = hasSoftmax ? log2f(sum) : notANumber();
    // Relative to the maximum itself, not to its rounded product; at least 0 but for rounding.
    float const logSum = (log2Sum - fmaf(maximum, kLog2E, -subtrahend)) * kLn2;
    merged.logNorm = logSum < 0.0f ? 0.0f : logSum;
    float const entropy = (log2Sum - weighted / sum) * kLn2;
    merged.entropy = entropy < 0.0f ? 0.0f : entropy;
    return merged;
}

}  // namespace fly::entropy_gate
