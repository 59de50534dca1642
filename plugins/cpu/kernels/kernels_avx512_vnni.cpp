// AVX-512 with VNNI: one instruction multiplies and adds 64 pairs of 8 bits.
#include <algorithm>
#include <array>
#include <utility>

#include "lanes_avx512.h"
#include "finish.h"
#include "quantize.h"
#include "read_logits.h"

namespace fly {
namespace {

constexpr size_t kRowsOfOnePass = 24;

constexpr size_t kPrefetch = 4096;  // bytes ahead

// The sums of R rows at B blocks, [R][B][16]. Rows lie in groups of 8, of which the first is at x.
template <size_t R, size_t B, _mm_hint Hint>
[[gnu::noinline]] void sum_tile(const int8_t* x, const uint8_t* w, size_t depth, size_t ahead, int32_t* result) {
    const size_t stride = depth * kBlock;
    __m512i sums[R][B];
#pragma GCC unroll 24
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (size_t b = 0; b < B; ++b) sums[r][b] = _mm512_setzero_si512();
    for (size_t k = 0; k < depth; k += 4, x += 4 * kRowGroup, w += 4 * kBlock) {
        __m512i columns[B];
#pragma GCC unroll 3
        for (size_t b = 0; b < B; ++b) {
            columns[b] = _mm512_loadu_si512(w + b * stride);
            _mm_prefetch(reinterpret_cast<const char*>(w + b * stride + ahead), Hint);
        }
#pragma GCC unroll 24
        for (size_t r = 0; r < R; ++r) {
            int32_t four;
            __builtin_memcpy(&four, x + r / kRowGroup * kRowGroup * depth + r % kRowGroup * 4, 4);
            const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 3
            for (size_t b = 0; b < B; ++b) sums[r][b] = _mm512_dpbusd_epi32(sums[r][b], columns[b], row);
        }
    }
#pragma GCC unroll 24
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (size_t b = 0; b < B; ++b) _mm512_storeu_si512(result + (r * B + b) * kBlock, sums[r][b]);
}

// Sums and what comes behind them are functions of their own: together GCC 12 writes all sums to memory in every pass.
template <size_t R, size_t B, _mm_hint Hint>
void multiply_tile(const Rows& rows, size_t first_row, const PackedWeight& weight, size_t block, size_t ahead, float* output) {
    const size_t depth = rows.padded_depth;
    alignas(64) int32_t sums[R * B * kBlock];
    sum_tile<R, B, Hint>(rows.values + first_row * depth, weight.values + block * depth * kBlock, depth, ahead, sums);
    for (size_t r = 0; r < R; ++r) {
        const __m512i offset = _mm512_set1_epi32(kWeightOffset * rows.sums[first_row + r]);
        for (size_t b = 0; b < B; ++b) {
            const __m512i part = _mm512_load_si512(sums + (r * B + b) * kBlock);
            finish({_mm512_cvtepi32_ps(_mm512_sub_epi32(part, offset))}, rows, first_row + r, weight, block + b, output);
        }
    }
}

using Tile = void (*)(const Rows&, size_t, const PackedWeight&, size_t, size_t, float*);

template <size_t B, _mm_hint Hint, size_t... R>
constexpr auto make_tiles(std::index_sequence<R...>) {
    return std::array<Tile, sizeof...(R)>{multiply_tile<R + 1, B, Hint>...};
}

template <size_t B, size_t MaxRows, _mm_hint Hint>
constexpr auto tiles = make_tiles<B, Hint>(std::make_index_sequence<MaxRows>{});

// All rows at B blocks. The first rows read the weights from memory, the others find them in a cache and fetch the next.
template <size_t B>
void multiply_blocks(const Rows& rows, const PackedWeight& weight, size_t block, float* output) {
    size_t row = 0;
    for (; row < rows.count; row += kRowGroup) {
        const size_t count = std::min(rows.count - row, kRowGroup);
        if (row == 0)
            tiles<B, kRowGroup, _MM_HINT_T0>[count - 1](rows, row, weight, block, kPrefetch, output);
        else
            tiles<B, kRowGroup, _MM_HINT_T1>[count - 1](rows, row, weight, block, B * rows.padded_depth * kBlock, output);
    }
}

void multiply(const Rows& rows, const PackedWeight& weight, size_t first, size_t end, float* output) {
    size_t block = first;
    if (rows.count > kRowGroup && rows.count <= kRowsOfOnePass) {
        const Tile tile = tiles<1, kRowsOfOnePass, _MM_HINT_T0>[rows.count - 1];
        for (; block < end; ++block) tile(rows, 0, weight, block, kPrefetch, output);
    }
    for (; block + 3 <= end; block += 3) multiply_blocks<3>(rows, weight, block, output);
    for (; block < end; ++block) multiply_blocks<1>(rows, weight, block, output);
}

}  // namespace

const Kernels* avx512_vnni_kernels() {
    static const Kernels table = {"avx512_vnni", quantize_row, multiply, read_logits};
    return &table;
}

}  // namespace fly
