// Tiles of AMX-INT8, 16 rows of 64 bytes, under one interface: those of the processor, and plain C++ that does the same
// on any machine, for the sake of the product's logic (product_amx.h). The instructions are written out, since
// compilers differ in whether the number of a tile may be a template's argument.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fly {
namespace {

constexpr size_t kTileRows = 16, kTileBytes = 64;

// What ldtilecfg reads.
struct alignas(64) TileConfiguration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(size_t tile, size_t num_rows) {
        row_bytes[tile] = kTileBytes;
        rows[tile] = static_cast<uint8_t>(num_rows);
    }
};

struct ProcessorTiles {
    static void configure(const TileConfiguration& configuration) {
        __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
    }
    // Leaves the thread as it was: others who use it need not save tiles.
    static void release() { __asm__ volatile("tilerelease"); }

    template <size_t T>
    static void zero() {
        __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
    }
    // Rows lie behind each other.
    template <size_t T>
    static void load(const void* p) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(kTileBytes), "i"(T) : "memory");
    }
    template <size_t T>
    static void store(void* p) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(kTileBytes), "i"(T) : "memory");
    }
    // sums [m][n] += values [m][k][4], signed, times weights [k][n][4], unsigned.
    template <size_t Sums, size_t Values, size_t Weights>
    static void add_products() {
        __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Values), "i"(Weights));
    }
};

struct EmulatedTiles {
    static void configure(const TileConfiguration& configuration) {
        rows_of() = configuration;
        std::memset(tile(0), 0, 8 * kTileRows * kTileBytes);
    }
    static void release() { rows_of() = TileConfiguration(); }

    template <size_t T>
    static void zero() {
        std::memset(tile(T), 0, kTileRows * kTileBytes);
    }
    // As the processor has it, rows beyond the configured ones become zero.
    template <size_t T>
    static void load(const void* p) {
        zero<T>();
        std::memcpy(tile(T), p, rows_of().rows[T] * kTileBytes);
    }
    template <size_t T>
    static void store(void* p) {
        std::memcpy(p, tile(T), rows_of().rows[T] * kTileBytes);
    }
    template <size_t Sums, size_t Values, size_t Weights>
    static void add_products() {
        const uint8_t* rows = rows_of().rows;
        if (rows[Sums] == 0 || rows[Sums] != rows[Values] || rows[Weights] * size_t{4} != kTileBytes)
            __builtin_trap();  // as the processor would
        int32_t sums[16];
        for (size_t m = 0; m < rows[Sums]; ++m) {
            std::memcpy(sums, tile(Sums) + m * kTileBytes, sizeof(sums));
            for (size_t k = 0; k < rows[Weights]; ++k)
                for (size_t i = 0; i < 64; ++i)
                    sums[i / 4] += static_cast<int8_t>(tile(Values)[m * kTileBytes + k * 4 + i % 4]) *
                        tile(Weights)[k * kTileBytes + i];
            std::memcpy(tile(Sums) + m * kTileBytes, sums, sizeof(sums));
        }
    }

   private:
    static TileConfiguration& rows_of() {
        thread_local TileConfiguration configuration;
        return configuration;
    }
    static uint8_t* tile(size_t number) {
        alignas(64) thread_local uint8_t tiles[8][kTileRows * kTileBytes];
        return tiles[number];
    }
};

}  // namespace
}  // namespace fly
