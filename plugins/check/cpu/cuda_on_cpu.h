// As much of CUDA as the plugins' kernels use, for a C++ compiler: runs the unchanged .cuh and .cu files on a CPU.
//
// Blocks run one after the other; the threads of a block are fibers that switch at barriers and warp collectives. A
// warp runs until it waits for another one, from the first warp to the last in one block and from the last to the
// first in the next, so a missing barrier shows as a wrong result. A collective that not all lanes of the warp reach,
// or that lanes reach at different operations, ends the process with a message. So does a 16-byte load outside the
// range that the test has named with watchLoads(). Slow, and meant to be simple. The neighbouring headers with CUDA's
// names only include this one.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    uint32_t x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(uint32_t x_, uint32_t y_ = 1) : x(x_), y(y_) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx;  // of the fiber that runs

namespace cuda_on_cpu {

constexpr uint32_t kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

[[noreturn]] inline void fail(char const* message, char const* detail) {
    std::fprintf(stderr, "cuda_on_cpu: %s: %s\n", message, detail);
    std::abort();
}

// A point that `expected` threads must reach, and the values that they bring along.
struct Meeting {
    uint32_t expected = 0;
    uint32_t numArrived = 0;
    uint64_t numCompleted = 0;
    char const* operation = nullptr;
    uint64_t brought[kWarpSize] = {};
    uint64_t values[kWarpSize] = {};
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    ucontext_t start;
    jmp_buf state;
    uint32_t thread = 0;
    bool isStarted = false;
    bool isDone = false;
    Meeting* waitsFor = nullptr;
    uint64_t waitsUntil = 0;
};

// The block that is running. setjmp and longjmp switch between fibers without the system calls of swapcontext().
struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    std::function<void()> kernel;
    Fiber* current = nullptr;
    jmp_buf scheduler;
    char const* watchedBegin = nullptr;
    char const* watchedEnd = nullptr;

    static Block& instance() {
        static Block block;
        return block;
    }

    static void enter() {
        Block& block = instance();
        block.kernel();
        block.current->isDone = true;
        longjmp(block.scheduler, 1);
    }

    __attribute__((noinline)) void resume(Fiber& fiber) {
        current = &fiber;
        threadIdx.x = fiber.thread;
        if (_setjmp(scheduler) != 0) return;
        if (fiber.isStarted) longjmp(fiber.state, 1);
        fiber.isStarted = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStackBytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, &Block::enter, 0);
        setcontext(&fiber.start);
    }

    __attribute__((noinline)) void meet(Meeting& meeting, uint32_t place, uint64_t value, char const* operation) {
        if (meeting.numArrived == 0) meeting.operation = operation;
        if (std::strcmp(meeting.operation, operation) != 0) fail("threads diverge, some are at", operation);
        if (place < kWarpSize) meeting.brought[place] = value;
        if (++meeting.numArrived == meeting.expected) {
            std::copy(std::begin(meeting.brought), std::end(meeting.brought), meeting.values);
            meeting.numArrived = 0;
            ++meeting.numCompleted;
            return;
        }
        current->waitsFor = &meeting;
        current->waitsUntil = meeting.numCompleted + 1;
        if (_setjmp(current->state) == 0) longjmp(scheduler, 1);
    }

    void run(uint32_t x, uint32_t y, uint32_t numThreads) {
        blockIdx = dim3(x, y);
        fibers.resize(std::max<size_t>(fibers.size(), numThreads));
        warps.assign((numThreads + kWarpSize - 1) / kWarpSize, Meeting{});
        for (size_t i = 0; i < warps.size(); ++i) {
            warps[i].expected = std::min<uint32_t>(kWarpSize, numThreads - static_cast<uint32_t>(i) * kWarpSize);
        }
        all = Meeting{};
        all.expected = numThreads;
        for (uint32_t i = 0; i < numThreads; ++i) {
            fibers[i].thread = i;
            fibers[i].isStarted = fibers[i].isDone = false;
            fibers[i].waitsFor = nullptr;
        }
        uint32_t const numWarps = static_cast<uint32_t>(warps.size());
        for (uint32_t numDone = 0; numDone < numThreads;) {
            bool hasProgress = false;
            for (uint32_t i = 0; i < numWarps; ++i) {
                uint32_t const warp = (x + y) % 2 == 0 ? i : numWarps - 1 - i;
                while (runWarp(warp, numDone)) hasProgress = true;
            }
            if (!hasProgress) fail("threads wait for others that have ended or diverged", "deadlock");
        }
    }

    // Resumes every thread of the warp that can go on; whether there was one.
    bool runWarp(uint32_t warp, uint32_t& numDone) {
        bool hasProgress = false;
        for (uint32_t i = 0; i < warps[warp].expected; ++i) {
            Fiber& fiber = fibers[warp * kWarpSize + i];
            if (fiber.isDone) continue;
            if (fiber.waitsFor != nullptr && fiber.waitsFor->numCompleted < fiber.waitsUntil) continue;
            fiber.waitsFor = nullptr;
            resume(fiber);
            hasProgress = true;
            numDone += fiber.isDone ? 1 : 0;
        }
        return hasProgress;
    }
};

inline uint32_t lane() { return threadIdx.x % kWarpSize; }

// All lanes of the warp bring a value; returns what they brought.
template <typename T>
Meeting const& gather(uint32_t mask, T value, char const* operation) {
    if (mask != 0xffffffffu) fail("only full warps are supported", operation);
    Block& block = Block::instance();
    Meeting& warp = block.warps[threadIdx.x / kWarpSize];
    if (warp.expected != kWarpSize) fail("the block's last warp is not full", operation);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(value));
    block.meet(warp, lane(), bits, operation);
    return warp;
}

template <typename T>
T valueAt(Meeting const& meeting, uint32_t place) {
    T value;
    std::memcpy(&value, &meeting.values[place], sizeof(value));
    return value;
}

template <typename T>
T load(T const* pointer) {
    Block const& block = Block::instance();
    auto const* const begin = reinterpret_cast<char const*>(pointer);
    if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) fail("load is not aligned to its size", "__ldg, __ldcs");
    if (block.watchedBegin != nullptr && (begin < block.watchedBegin || begin + sizeof(T) > block.watchedEnd)) {
        fail("load outside the watched range", "__ldg, __ldcs");
    }
    T value;
    std::memcpy(&value, pointer, sizeof(value));
    return value;
}

}  // namespace cuda_on_cpu

// Until the next call, loads with __ldg() and __ldcs() must lie in the range.
inline void watchLoads(void const* begin, size_t numBytes) {
    auto& block = cuda_on_cpu::Block::instance();
    block.watchedBegin = static_cast<char const*>(begin);
    block.watchedEnd = block.watchedBegin + numBytes;
}

inline void __syncthreads() {
    auto& block = cuda_on_cpu::Block::instance();
    block.meet(block.all, cuda_on_cpu::kWarpSize, 0, "__syncthreads");
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
    auto const& meeting = cuda_on_cpu::gather(mask, value, "__shfl_xor_sync");
    return cuda_on_cpu::valueAt<T>(meeting, cuda_on_cpu::lane() ^ static_cast<uint32_t>(distance));
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
    auto const& meeting = cuda_on_cpu::gather(mask, predicate, "__ballot_sync");
    uint32_t ballot = 0;
    for (uint32_t i = 0; i < cuda_on_cpu::kWarpSize; ++i) ballot |= (meeting.values[i] != 0 ? 1u : 0u) << i;
    return ballot;
}

inline void __syncwarp() { cuda_on_cpu::gather(0xffffffffu, 0, "__syncwarp"); }

inline uint32_t atomicMin(uint32_t* address, uint32_t value) {  // one thread runs at a time
    uint32_t const old = *address;
    *address = std::min(old, value);
    return old;
}

inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
    auto const& meeting = cuda_on_cpu::gather(mask, value, "__reduce_max_sync");
    return static_cast<uint32_t>(*std::max_element(std::begin(meeting.values), std::end(meeting.values)));
}

inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
    auto const& meeting = cuda_on_cpu::gather(mask, value, "__reduce_min_sync");
    return static_cast<uint32_t>(*std::min_element(std::begin(meeting.values), std::end(meeting.values)));
}

template <typename T>
T __ldg(T const* pointer) { return cuda_on_cpu::load(pointer); }
template <typename T>
T __ldcs(T const* pointer) { return cuda_on_cpu::load(pointer); }

inline int __ffs(int value) { return __builtin_ffs(value); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
using std::min;

// Pairs of 16-bit elements. A maximum or minimum ignores a NaN unless both operands are NaN, as on the device; _nan
// keeps it.
struct __half2 {
    _Float16 x, y;
};
struct __nv_bfloat162 {
    uint16_t x, y;
};
inline float __low2float(__half2 pair) { return static_cast<float>(pair.x); }
inline float __high2float(__half2 pair) { return static_cast<float>(pair.y); }
inline __half2 __float2half2_rn(float value) { return {static_cast<_Float16>(value), static_cast<_Float16>(value)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float value) {  // of a value that is not a NaN
    uint32_t const word = __float_as_uint(value);
    auto const bits = static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
    return {bits, bits};
}

namespace cuda_on_cpu {

inline float maxOrNan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : fmaxf(a, b); }

inline __half2 choose(float (*chooser)(float, float), __half2 a, __half2 b) {
    return {static_cast<_Float16>(chooser(a.x, b.x)), static_cast<_Float16>(chooser(a.y, b.y))};
}

inline __nv_bfloat162 choose(float (*chooser)(float, float), __nv_bfloat162 a, __nv_bfloat162 b) {
    auto const one = [chooser](uint16_t left, uint16_t right) {
        float const value = chooser(__uint_as_float(uint32_t{left} << 16), __uint_as_float(uint32_t{right} << 16));
        return static_cast<uint16_t>(__float_as_uint(value) >> 16);
    };
    return {one(a.x, b.x), one(a.y, b.y)};
}

}  // namespace cuda_on_cpu

template <typename Pair>
Pair __hmax2(Pair a, Pair b) { return cuda_on_cpu::choose(fmaxf, a, b); }
template <typename Pair>
Pair __hmin2(Pair a, Pair b) { return cuda_on_cpu::choose(fminf, a, b); }

// Whether both pairs of elements differ; a NaN differs from everything.
inline bool __hbneu2(__half2 a, __half2 b) { return a.x != b.x && a.y != b.y; }
inline bool __hbneu2(__nv_bfloat162 a, __nv_bfloat162 b) {
    auto const value = [](uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); };
    return value(a.x) != value(b.x) && value(a.y) != value(b.y);
}

template <typename Pair>
Pair __hmax2_nan(Pair a, Pair b) { return cuda_on_cpu::choose(cuda_on_cpu::maxOrNan, a, b); }

// The runtime's launch interface. Streams mean nothing: a launch has finished when it returns.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
struct cudaFuncAttributes {
    int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned int numAttrs;
};

enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };

inline cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t numBytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, numBytes);
    return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
    attributes->ptxVersion = 90;
    return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    cudaLaunchConfig_t const* config, void (*kernel)(Parameters...), Arguments... arguments) {
    auto& block = cuda_on_cpu::Block::instance();
    block.kernel = [=] { kernel(arguments...); };
    for (uint32_t y = 0; y < config->gridDim.y; ++y) {
        for (uint32_t x = 0; x < config->gridDim.x; ++x) block.run(x, y, config->blockDim.x);
    }
    return cudaSuccess;
}
