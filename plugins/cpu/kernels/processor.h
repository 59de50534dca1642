// What the processor has and the system keeps for each thread, asked of the processor itself: compilers' own functions
// know different names for it.
#pragma once

#include <cpuid.h>

#include <cstdint>

namespace fly {
namespace {

struct Processor {
    bool has_avx2, has_avx512, has_avx512_vnni, has_avx_vnni, has_amx;  // has_avx2: with FMA and F16C
};

inline bool has_bits(uint64_t word, uint64_t bits) { return (word & bits) == bits; }
constexpr uint64_t bit(int index) { return uint64_t{1} << index; }

// XCR0: which registers the system saves and restores.
inline uint64_t saved_registers() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
}

inline Processor processor() {
    constexpr uint64_t avx_state = 0x6, avx512_state = 0xE6, tile_state = 0x60000;  // of XCR0
    uint32_t eax, ebx, ecx, edx, unused, eax_1 = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has_bits(ecx, bit(27))) return {};  // OSXSAVE
    const bool has_avx = has_bits(ecx, bit(12) | bit(28) | bit(29));                    // FMA, AVX, F16C
    const uint64_t saved = saved_registers();
    if (!has_avx || !has_bits(saved, avx_state) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return {};
    if (eax >= 1) __get_cpuid_count(7, 1, &eax_1, &unused, &unused, &unused);
    Processor found = {};
    found.has_avx2 = has_bits(ebx, bit(5));
    found.has_avx_vnni = found.has_avx2 && has_bits(eax_1, bit(4));
    // F, DQ, BW, VL
    found.has_avx512 =
        found.has_avx2 && has_bits(ebx, bit(16) | bit(17) | bit(30) | bit(31)) && has_bits(saved, avx512_state);
    found.has_avx512_vnni = found.has_avx512 && has_bits(ecx, bit(11));
    found.has_amx =
        found.has_avx512_vnni && has_bits(edx, bit(24) | bit(25)) && has_bits(saved, tile_state);  // TILE, INT8
    return found;
}

}  // namespace
}  // namespace fly
