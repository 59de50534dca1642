// Attention in AVX2: 12 of its 16 registers hold sums.
#include "lanes_avx2.h"

namespace fly {
namespace {

constexpr size_t kProductLanes = 6;

}  // namespace
}  // namespace fly

#include "attention_loops.h"

namespace fly {

const AttentionKernels* avx2_attention() { return &kAttention; }

}  // namespace fly
