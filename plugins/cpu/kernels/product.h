// Rows times a packed weight, for kinds of vector units that multiply one register with another. The file of a kind
// includes its lanes, then this, and gives a `Unit`:
//
//   using Register = ...;                // of 32-bit sums
//   static constexpr size_t kRows;       // of a tile, and of a group of rows
//   static constexpr size_t kBlocks;     // of a tile: as many as the registers have room for
//   static constexpr size_t kRowsOfOnePass;  // up to so many are multiplied with one block at once
//   zero(), load(p), every(four bytes), store(p, sums), add_products(sums, weights, row)
#pragma once

#include "finish.h"

namespace fly {
namespace {

constexpr size_t kQuad = 4;        // inputs that lie side by side, of a row and of an output
constexpr size_t kPrefetch = 4096;  // bytes ahead in the weights

template <typename Unit>
struct Product {
    using Register = typename Unit::Register;
    static constexpr size_t kLanes = sizeof(Register) / sizeof(int32_t);
    static constexpr size_t kParts = kBlock / kLanes;  // registers of a block
    static constexpr size_t kRows = Unit::kRows;
    static constexpr size_t kOnePass = Unit::kRowsOfOnePass;

    static RowLayout layout(size_t) { return {kRows, kQuad}; }

    static void multiply(const Rows& rows, const PackedWeight& weight, size_t first, size_t end, float* output) {
        size_t block = first;
        if (rows.count > kRows && rows.count <= kOnePass)
            for (; block < end; ++block) up_to<1, kOnePass, _MM_HINT_T0>(rows, 0, weight, block, kPrefetch, output);
        for (; block + Unit::kBlocks <= end; block += Unit::kBlocks) blocks<Unit::kBlocks>(rows, weight, block, output);
        for (; block < end; ++block) blocks<1>(rows, weight, block, output);
    }

   private:
    // All rows at B blocks. The first rows read the weights from memory, the others find them in a cache and fetch the
    // next.
    template <size_t B>
    static void blocks(const Rows& rows, const PackedWeight& weight, size_t block, float* output) {
        up_to<B, kRows, _MM_HINT_T0>(rows, 0, weight, block, kPrefetch, output);
        const size_t next = B * rows.padded_depth * kBlock;
        for (size_t row = kRows; row < rows.count; row += kRows)
            up_to<B, kRows, _MM_HINT_T1>(rows, row, weight, block, next, output);
    }

    // The rows from first_row on, R at most.
    template <size_t B, size_t R, _mm_hint Hint>
    static void up_to(
        const Rows& rows, size_t first_row, const PackedWeight& weight, size_t block, size_t ahead, float* output) {
        if constexpr (R > 1)
            if (rows.count - first_row < R) return up_to<B, R - 1, Hint>(rows, first_row, weight, block, ahead, output);
        tile<B, R, Hint>(rows, first_row, weight, block, ahead, output);
    }

    template <size_t B, size_t R, _mm_hint Hint>
    [[gnu::noinline]] static void tile(
        const Rows& rows, size_t first_row, const PackedWeight& weight, size_t block, size_t ahead, float* output) {
        const size_t depth = rows.padded_depth;
        alignas(64) int32_t sums[R * B * kBlock];
        sum<R, B, Hint>(rows.values + first_row * depth, weight.values + block * depth * kBlock, depth, ahead, sums);
        for (size_t r = 0; r < R; ++r)
            for (size_t b = 0; b < B; ++b)
                finish(sums + (r * B + b) * kBlock, rows, first_row + r, weight, block + b, output);
    }

    // The sums of R rows at B blocks, [R][B][16]. A function of its own: together with what comes behind it GCC 12
    // writes all sums to memory in every pass.
    template <size_t R, size_t B, _mm_hint Hint>
    [[gnu::noinline]] static void sum(const int8_t* x, const uint8_t* w, size_t depth, size_t ahead, int32_t* result) {
        constexpr size_t N = B * kParts;
        const size_t stride = depth * kBlock;
        Register sums[R][N];
#pragma GCC unroll 24
        for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (size_t n = 0; n < N; ++n) sums[r][n] = Unit::zero();
        for (size_t k = 0; k < depth; k += kQuad, x += kQuad * kRows, w += kQuad * kBlock) {
            Register columns[N];
#pragma GCC unroll 8
            for (size_t n = 0; n < N; ++n) {
                const uint8_t* column = w + n / kParts * stride;
                columns[n] = Unit::load(column + n % kParts * sizeof(Register));
                if (n % kParts == 0) _mm_prefetch(reinterpret_cast<const char*>(column + ahead), Hint);
            }
#pragma GCC unroll 24
            for (size_t r = 0; r < R; ++r) {
                int32_t four;
                __builtin_memcpy(&four, x + r / kRows * kRows * depth + r % kRows * kQuad, kQuad);
                const Register row = Unit::every(four);
#pragma GCC unroll 8
                for (size_t n = 0; n < N; ++n) sums[r][n] = Unit::add_products(sums[r][n], columns[n], row);
            }
        }
#pragma GCC unroll 24
        for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (size_t n = 0; n < N; ++n) Unit::store(result + (r * N + n) * kLanes, sums[r][n]);
    }
};

}  // namespace
}  // namespace fly
