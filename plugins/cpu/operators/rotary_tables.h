// Cosines and sines of the positions of a step, for rotary embeddings.
//
// write_indices int64 [B], input_ids int64 [B, T], of which only T is read, inverse frequencies float32 [R / 2] -> cos,
// sin float32 [B, T, R / 2] of (write_indices[b] + t) f, times the attribute `scaling`. Angles are products in float32,
// as in the models' own code, and cosines and sines those of the rounded angle.
#pragma once

#include "operator.h"

namespace fly {

class RotaryTables {
   public:
    static constexpr const char* name = "RotaryTables";
    static constexpr Slot inputs[] = {{ElementType::kInt64}, {ElementType::kInt64}, {ElementType::kFloat}};
    static constexpr Slot outputs[] = {{ElementType::kFloat}, {ElementType::kFloat}};

    explicit RotaryTables(const Attributes& attributes) : scaling_(attributes.number("scaling", 1.0F)) {}
    void compute(const Context& context) const;

   private:
    float scaling_;
};

}  // namespace fly
