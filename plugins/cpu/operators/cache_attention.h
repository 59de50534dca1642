// Attention of new tokens over a cache that it first writes their keys and values to; what it costs follows how many
// keys are valid, not how many the cache has room for.
//
// query float32 [B, T, (Hq + 2 Hkv) D], query, key and value side by side, or [B, T, Hq D] with key and value [B, T,
// Hkv D]; write_indices int64 [B], the position of each sequence's first new token; past_key [B, Hkv, S / 16, D, 16],
// blocks of 16 tokens that are transposed inside; past_value [B, Hkv, S, D]; both float32, or float16, where values
// beyond +-65504 become these; cos, sin float32 [B, T, R / 2] rotate the two halves of the first R channels of queries
// and keys; query_norm, key_norm float32 [D] are weights of an RMS norm of each head before the rotation.
// -> y float32 [B, T, Hq D], present_key, present_value: the memory of past_* where the caller bound it so, else a
// copy. A node without these two writes to past_* itself: in the body of a Loop, whose outputs nobody can bind.
//
// Attributes: num_heads (Hq), num_kv_heads (Hkv), scale, softcap (0: none), window (0: none; the query at p sees the
// keys p - window + 1 .. p), epsilon (of the norms). D and S are multiples of 16. A query that is not finite gives NaN,
// and what is not finite in the cache reaches only the queries that see it.
#pragma once

#include "../kernels/kernels.h"
#include "operator.h"

namespace fly {

class CacheAttentionBase {
   public:
    explicit CacheAttentionBase(const Attributes& attributes);
    void compute(const Context& context, bool is_half) const;

   private:
    void attend(const Context& context, const Attention& attention) const;

    const AttentionKernels& kernels_;
    size_t heads_, kv_heads_, window_;
    float scale_, softcap_, epsilon_;
};

template <typename Element>
class CacheAttention : public CacheAttentionBase {
    static constexpr ElementType kCache = sizeof(Element) == sizeof(Half) ? ElementType::kFloat16 : ElementType::kFloat;

   public:
    static constexpr const char* name = "CacheAttention";
    static constexpr Slot inputs[] = {
        {ElementType::kFloat},
        {ElementType::kFloat, Presence::kOptional},
        {ElementType::kFloat, Presence::kOptional},
        {ElementType::kInt64},
        {kCache},
        {kCache},
        {ElementType::kFloat, Presence::kOptional},
        {ElementType::kFloat, Presence::kOptional},
        {ElementType::kFloat, Presence::kOptional},
        {ElementType::kFloat, Presence::kOptional},
    };
    static constexpr Slot outputs[] = {
        {ElementType::kFloat}, {kCache, Presence::kOptional}, {kCache, Presence::kOptional}};

    using CacheAttentionBase::CacheAttentionBase;
    void compute(const Context& context) const {
        CacheAttentionBase::compute(context, kCache == ElementType::kFloat16);
    }
};

}  // namespace fly
