// Rows times a packed weight, for kinds of vector units that multiply one register with another. The file of a kind
// includes its lanes, then this, and gives a `Unit`:
//
//   using Register = ...;             // of 32-bit sums
//   static constexpr size_t kRows;    // of a tile, and of a group of rows
//   static constexpr size_t kBlocks;  // of a tile: as many as the registers have room for
//   zero(), load(p), every(four bytes), store(p, sums), add_products(sums, weights, row)
#pragma once

#include "finish.h"

namespace fly {
namespace {

constexpr size_t kQuad = 4;           // inputs that lie side by side, of a row and of an output
constexpr size_t kFromMemory = 4096;  // bytes that weights are fetched ahead, from memory and from the next cache
constexpr size_t kFromCache = 512;

template <typename Unit>
struct Product {
    using Register = typename Unit::Register;
    static constexpr size_t kLanes = sizeof(Register) / sizeof(int32_t);
    static constexpr size_t kParts = kBlock / kLanes;  // registers of a block
    static constexpr size_t kRows = Unit::kRows;
    static constexpr size_t kTaskBlocks = 3;  // whole tiles of every unit

    static RowLayout layout(size_t) { return {kRows, kQuad}; }

    static void multiply(const Rows& rows, const PackedWeight& weight, size_t first, size_t end, float* output) {
        size_t block = first;
        for (; block + Unit::kBlocks <= end; block += Unit::kBlocks) blocks<Unit::kBlocks>(rows, weight, block, output);
        for (; block < end; ++block) blocks<1>(rows, weight, block, output);
    }

   private:
    // All rows at B blocks, a group at a time. One group reads the weights from memory as it goes. Of several each
    // fetches a part of the next blocks into the second cache, so that memory never waits for the arithmetic.
    template <size_t B>
    static void blocks(const Rows& rows, const PackedWeight& weight, size_t block, float* output) {
        const size_t depth = rows.padded_depth;
        if (rows.count <= kRows) return up_to<B, kRows, 0>(rows, 0, weight, block, kFromMemory, 0, output);
        const size_t next = B * depth * kBlock, stride = depth * kBlock;
        constexpr size_t kFirst = B == 3 ? 2 : 1;
        size_t row = 0, fetched = 0;
        if (rows.count <= 2 * kRows) {
            tile<B, kRows, kFirst>(rows, 0, weight, block, kFromCache, next, output);
            row = kRows;
            fetched = kFirst;
        }
        for (; row < rows.count && fetched < B; row += kRows, ++fetched)
            up_to<B, kRows, 1>(rows, row, weight, block, kFromCache, next + fetched * stride, output);
        for (; row < rows.count; row += kRows) up_to<B, kRows, 0>(rows, row, weight, block, kFromCache, 0, output);
    }

    // The rows from first_row on, R at most.
    template <size_t B, size_t R, size_t Fetched>
    static void up_to(
        const Rows& rows, size_t first_row, const PackedWeight& weight, size_t block, size_t ahead, size_t next,
        float* output) {
        if constexpr (R > 1)
            if (rows.count - first_row < R)
                return up_to<B, R - 1, Fetched>(rows, first_row, weight, block, ahead, next, output);
        tile<B, R, Fetched>(rows, first_row, weight, block, ahead, next, output);
    }

    template <size_t B, size_t R, size_t Fetched>
    [[gnu::noinline]] static void tile(
        const Rows& rows, size_t first_row, const PackedWeight& weight, size_t block, size_t ahead, size_t next,
        float* output) {
        const size_t depth = rows.padded_depth;
        alignas(64) int32_t sums[R * B * kBlock];
        const uint8_t* w = weight.values + block * depth * kBlock;
        sum<R, B, Fetched>(rows.values + first_row * depth, w, depth, ahead, w + next, sums);
        for (size_t r = 0; r < R; ++r)
            for (size_t b = 0; b < B; ++b)
                finish(sums + (r * B + b) * kBlock, rows, first_row + r, weight, block + b, output);
    }

    // The sums of R rows at B blocks, [R][B][16]; meanwhile `Fetched` blocks at `next` come into the second cache. A
    // function of its own: together with what comes behind it GCC 12 writes all sums to memory in every pass.
    template <size_t R, size_t B, size_t Fetched>
    [[gnu::noinline]] static void sum(
        const int8_t* x, const uint8_t* w, size_t depth, size_t ahead, const uint8_t* next, int32_t* result) {
        constexpr size_t N = B * kParts;
        const size_t stride = depth * kBlock;
        Register sums[R][N];
#pragma GCC unroll 8
        for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (size_t n = 0; n < N; ++n) sums[r][n] = Unit::zero();
        for (size_t k = 0; k < depth; k += kQuad, x += kQuad * kRows, w += kQuad * kBlock, next += kQuad * kBlock) {
            Register columns[N];
#pragma GCC unroll 8
            for (size_t n = 0; n < N; ++n) {
                const uint8_t* column = w + n / kParts * stride;
                columns[n] = Unit::load(column + n % kParts * sizeof(Register));
                if (n % kParts == 0) _mm_prefetch(reinterpret_cast<const char*>(column + ahead), _MM_HINT_T0);
            }
#pragma GCC unroll 8
            for (size_t b = 0; b < Fetched; ++b)
                _mm_prefetch(reinterpret_cast<const char*>(next + b * stride), _MM_HINT_T1);
#pragma GCC unroll 8
            for (size_t r = 0; r < R; ++r) {
                int32_t four;
                __builtin_memcpy(&four, x + r * kQuad, kQuad);
                const Register row = Unit::every(four);
#pragma GCC unroll 8
                for (size_t n = 0; n < N; ++n) sums[r][n] = Unit::add_products(sums[r][n], columns[n], row);
            }
        }
#pragma GCC unroll 8
        for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (size_t n = 0; n < N; ++n) Unit::store(result + (r * N + n) * kLanes, sums[r][n]);
    }
};

}  // namespace
}  // namespace fly
