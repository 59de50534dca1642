// Attention in AVX-512: 24 of its 32 registers hold sums.
#include "lanes_avx512.h"

namespace fly {
namespace {

constexpr size_t kProductLanes = 24;

}  // namespace
}  // namespace fly

#include "attention_loops.h"

namespace fly {

const AttentionKernels* avx512_attention() { return &kAttention; }

}  // namespace fly
