// The two products of attention, for up to kQueryGroup queries that share what is loaded of keys and values. Included
// by attention_loops.h.
#pragma once

#include "attention.h"

namespace fly {
namespace {

inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

// Lanes side by side that R rows sum up: all sums stay in registers.
template <size_t R>
constexpr size_t product_width = kProductLanes / R >= 4 ? 4
    : kProductLanes / R >= 2                            ? 2
                                                        : 1;

// Few queries wait for memory: they ask for what comes next. More find it in a cache.
template <size_t R, typename Element>
void fetch(const Element* p) {
    if constexpr (R < kQueryGroup) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}
constexpr size_t kValuesAhead = 4096;  // bytes

// Scores of R queries [R][dim] with the keys of V blocks: channel after channel. scores: [R] rows of kKeyChunk.
template <size_t R, size_t V, typename Element>
[[gnu::noinline]] void score_tile(const float* query, const Element* keys, size_t dim, float* scores) {
    const size_t stride = dim * kKeyBlock;
    Lanes sums[R][V];
#pragma GCC unroll 6
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (size_t v = 0; v < V; ++v) sums[r][v] = Lanes::zero();
    for (size_t d = 0; d < dim; ++d, keys += kKeyBlock) {
        Lanes block[V];
#pragma GCC unroll 4
        for (size_t v = 0; v < V; ++v) {
            block[v] = Lanes::load(keys + v * stride);
            fetch<R>(keys + (V + v) * stride);
        }
#pragma GCC unroll 6
        for (size_t r = 0; r < R; ++r) {
            const Lanes channel = Lanes::all(query[r * dim + d]);
#pragma GCC unroll 4
            for (size_t v = 0; v < V; ++v) sums[r][v] = fma(channel, block[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (size_t v = 0; v < V; ++v) sums[r][v].store(scores + r * kKeyChunk + v * kKeyBlock);
}

// Adds the values of `count` keys at 16 V channels, each times its weight, to the sums of R queries: key after key.
template <size_t R, size_t V, typename Element>
[[gnu::noinline]] void weigh_tile(
    const float* weights, const Element* values, size_t count, size_t dim, float* result) {
    Lanes sums[R][V];
#pragma GCC unroll 6
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (size_t v = 0; v < V; ++v) sums[r][v] = Lanes::load(result + r * dim + v * 16);
    for (size_t k = 0; k < count; ++k, values += dim) {
        Lanes channels[V];
#pragma GCC unroll 4
        for (size_t v = 0; v < V; ++v) {
            channels[v] = Lanes::load(values + v * 16);
            fetch<R>(values + v * 16 + kValuesAhead / sizeof(Element));
        }
#pragma GCC unroll 6
        for (size_t r = 0; r < R; ++r) {
            const Lanes weight = Lanes::all(weights[r * kKeyChunk + k]);
#pragma GCC unroll 4
            for (size_t v = 0; v < V; ++v) sums[r][v] = fma(weight, channels[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (size_t v = 0; v < V; ++v) sums[r][v].store(result + r * dim + v * 16);
}

template <size_t R, size_t V, typename Element>
void score_blocks(const float* query, const Element* keys, size_t blocks, size_t dim, float* scores) {
    for (; blocks >= V; blocks -= V, keys += V * dim * kKeyBlock, scores += V * kKeyBlock)
        score_tile<R, V>(query, keys, dim, scores);
    if constexpr (V > 1)
        if (blocks > 0) score_blocks<R, V / 2>(query, keys, blocks, dim, scores);
}

template <size_t R, size_t V, typename Element>
void weigh_channels(const float* weights, const Element* values, size_t count, size_t dim, size_t at, float* sums) {
    for (; at + 16 * V <= dim; at += 16 * V) weigh_tile<R, V>(weights, values + at, count, dim, sums + at);
    if constexpr (V > 1)
        if (at < dim) weigh_channels<R, V / 2>(weights, values, count, dim, at, sums);
}

template <size_t R, typename Element>
void score(const float* query, const Element* keys, size_t blocks, size_t dim, float* scores) {
    score_blocks<R, product_width<R>>(query, keys, blocks, dim, scores);
}

template <size_t R, typename Element>
void weigh(const float* weights, const Element* values, size_t count, size_t dim, float* sums) {
    weigh_channels<R, product_width<R>>(weights, values, count, dim, 0, sums);
}

template <typename Element>
void score_rows(size_t rows, const float* query, const Element* keys, size_t blocks, size_t dim, float* scores) {
    static constexpr decltype(&score<1, Element>) of_rows[kQueryGroup] = {score<1, Element>, score<2, Element>,
                                                                          score<3, Element>, score<4, Element>,
                                                                          score<5, Element>, score<6, Element>};
    of_rows[rows - 1](query, keys, blocks, dim, scores);
}

template <typename Element>
void weigh_rows(size_t rows, const float* weights, const Element* values, size_t count, size_t dim, float* sums) {
    static constexpr decltype(&weigh<1, Element>) of_rows[kQueryGroup] = {weigh<1, Element>, weigh<2, Element>,
                                                                          weigh<3, Element>, weigh<4, Element>,
                                                                          weigh<5, Element>, weigh<6, Element>};
    of_rows[rows - 1](weights, values, count, dim, sums);
}

}  // namespace
}  // namespace fly
