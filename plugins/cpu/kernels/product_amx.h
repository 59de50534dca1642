// Rows times a packed weight by tiles: 64 inputs of a block of 16 outputs are one tile of weights as they lie, and 16
// rows of 64 bytes one of values. `Tiles` are the processor's or emulated ones (amx_tiles.h). The file of a kind
// includes its lanes, then this.
#pragma once

#include <immintrin.h>

#include <utility>

#include "amx_tiles.h"
#include "finish.h"

namespace fly {
namespace {

// Up to so many rows leave a register's product waiting for memory, as they would tiles.
constexpr size_t kRowsWithoutTiles = 8;
constexpr size_t kTilePrefetch = 4096;  // bytes ahead in the weights
constexpr size_t kTileSize = kTileRows * kTileBytes;
static_assert(kTileBytes == kDepthStep && kTileBytes == kBlock * sizeof(int32_t));

template <typename Tiles>
class AmxProduct {
   public:
    static constexpr RowLayout kLayout = {kTileRows, kTileBytes};
    static constexpr size_t kTaskBlocks = 4;

    // `rows` are in kLayout.
    static void multiply(const Rows& rows, const PackedWeight& weight, size_t first, size_t end, float* output) {
        Tiles::configure(configuration(rows.count));
        size_t block = first;
        if (rows.count <= kTileRows) {
            for (; block + 4 <= end; block += 4) tile<1, 4>(rows, 0, weight, block, kOwn, output);
            for (; block < end; ++block) tile<1, 1>(rows, 0, weight, block, kOwn, output);
        } else {
            for (; block + 2 <= end; block += 2) blocks<2>(rows, weight, block, output);
            for (; block < end; ++block) blocks<1>(rows, weight, block, output);
        }
        Tiles::release();
    }

   private:
    // What a pass fetches: of so many of its blocks what lies so many bytes ahead. Of all of them, what it will read
    // itself from memory, into the first cache; or of one what later passes will read, into the second.
    struct Fetch {
        size_t blocks;
        size_t ahead;
    };
    static constexpr Fetch kOwn = {4, kTilePrefetch};

    // Tiles 0 to 3 are sums, 4 and 5 values, 6 and 7 weights. A tile of few rows takes less time. With more than two
    // groups all tiles are full, the last one with rows that nobody looks at.
    static TileConfiguration configuration(size_t count) {
        TileConfiguration tiles;
        const size_t rows = count < kTileRows ? count : kTileRows;
        const size_t more = count <= kTileRows ? rows : count < 2 * kTileRows ? count - kTileRows : kTileRows;
        for (const size_t tile : {0, 1, 4}) tiles.set(tile, rows);
        for (const size_t tile : {2, 3, 5}) tiles.set(tile, more);
        for (const size_t tile : {6, 7}) tiles.set(tile, kTileRows);
        return tiles;
    }

    // More than one group of rows at B blocks, two groups in a pass. One pass reads the weights from memory as it goes.
    // Of several each fetches one of the next blocks into the second cache, so that memory never waits for the
    // arithmetic.
    template <size_t B>
    static void blocks(const Rows& rows, const PackedWeight& weight, size_t block, float* output) {
        constexpr size_t kPassRows = 2 * kTileRows;
        const size_t stride = rows.padded_depth * kBlock;
        for (size_t row = 0, next = B; row < rows.count; row += kPassRows, ++next) {
            const Fetch fetch = rows.count <= kPassRows ? kOwn : next < 2 * B ? Fetch{1, next * stride} : Fetch{0, 0};
            if (row + kTileRows < rows.count)
                tile<2, B>(rows, row, weight, block, fetch, output);
            else
                tile<1, B>(rows, row, weight, block, fetch, output);
        }
    }

    // G groups of rows at B blocks: as many as there are tiles of sums, or fewer.
    template <size_t G, size_t B>
    static void tile(
        const Rows& rows, size_t first_row, const PackedWeight& weight, size_t block, Fetch fetch, float* output) {
        alignas(64) int32_t sums[G * B][kTileRows][kBlock];
        sum<G>(rows, first_row, weight, block, fetch, sums[0][0], std::make_index_sequence<B>{});
        for (size_t g = 0; g < G; ++g)
            for (size_t r = 0, row = first_row + g * kTileRows; r < kTileRows && row < rows.count; ++r, ++row)
                for (size_t b = 0; b < B; ++b) finish(sums[g * B + b][r], rows, row, weight, block + b, output);
    }

    template <size_t G, size_t... B>
    [[gnu::noinline]] static void sum(
        const Rows& rows, size_t first_row, const PackedWeight& weight, size_t block, Fetch fetch, int32_t* result,
        std::index_sequence<B...>) {
        constexpr size_t N = sizeof...(B);
        const size_t depth = rows.padded_depth;
        const int8_t* x = rows.values + first_row * depth;
        const uint8_t* w = weight.values + block * depth * kBlock;
        (zero<G, N, B>(), ...);
        for (size_t k = 0; k < depth; k += kTileBytes, x += kTileSize, w += kTileSize) {
            Tiles::template load<4>(x);
            if constexpr (G == 2) Tiles::template load<5>(x + kTileRows * depth);
            (add_block<G, N, B>(w + B * depth * kBlock, fetch), ...);
        }
        (store<G, N, B>(result), ...);
    }

    template <size_t G, size_t N, size_t B>
    static void zero() {
        Tiles::template zero<B>();
        if constexpr (G == 2) Tiles::template zero<2 + B>();
    }

    template <size_t G, size_t N, size_t B>
    static void add_block(const uint8_t* w, Fetch fetch) {
        constexpr size_t tile = 6 + B % 2;
        Tiles::template load<tile>(w);
        if (B < fetch.blocks)
            for (size_t i = 0; i < kTileSize; i += 64) {
                const auto* line = reinterpret_cast<const char*>(w + fetch.ahead + i);
                if (fetch.blocks == 1)
                    _mm_prefetch(line, _MM_HINT_T1);
                else
                    _mm_prefetch(line, _MM_HINT_T0);
            }
        Tiles::template add_products<B, 4, tile>();
        if constexpr (G == 2) Tiles::template add_products<2 + B, 5, tile>();
    }

    template <size_t G, size_t N, size_t B>
    static void store(int32_t* result) {
        Tiles::template store<B>(result + B * kTileRows * kBlock);
        if constexpr (G == 2) Tiles::template store<2 + B>(result + (N + B) * kTileRows * kBlock);
    }
};

// A kind that multiplies few rows as `Few` do and others by tiles.
template <typename Tiles, const Kernels* (*Few)()>
Kernels with_tiles(const char* name) {
    Kernels kernels = *Few();
    kernels.name = name;
    kernels.task_blocks = AmxProduct<Tiles>::kTaskBlocks;
    kernels.row_layout = [](size_t count) {
        return count <= kRowsWithoutTiles ? Few()->row_layout(count) : AmxProduct<Tiles>::kLayout;
    };
    kernels.multiply = [](const Rows& rows, const PackedWeight& weight, size_t first, size_t end, float* output) {
        const auto multiply = rows.layout.chunk == kTileBytes ? AmxProduct<Tiles>::multiply : Few()->multiply;
        multiply(rows, weight, first, end, output);
    };
    return kernels;
}

}  // namespace
}  // namespace fly
