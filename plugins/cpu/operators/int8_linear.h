// y = f(x) W^T of 8-bit rows and a packed weight, with what stands around it in a decoder layer: before the product an
// RMS norm, or a gated activation; behind it a bias and a residual.
//
// x float32 [..., K], or [..., 2 K] for a gated activation (gates, then values); weight uint8 [N / 16, K / 4, 16, 4]
// (kernels.h), both padded up; scales float32 [N]; norm float32 [K] for the norm; bias float32 [N]; residual float32
// [..., N] -> y float32 [..., N]. Each row is rounded by its own largest magnitude, so that no row depends on another.
#pragma once

#include "../kernels/kernels.h"
#include "operator.h"

namespace fly {

class Int8Linear {
   public:
    static constexpr const char* name = "Int8Linear";
    static constexpr Slot inputs[] = {
        {ElementType::kFloat},
        {ElementType::kUint8},
        {ElementType::kFloat},
        {ElementType::kFloat, Presence::kOptional},
        {ElementType::kFloat, Presence::kOptional},
        {ElementType::kFloat, Presence::kOptional},
    };
    static constexpr Slot outputs[] = {{ElementType::kFloat}};

    explicit Int8Linear(const Attributes& attributes);
    void compute(const Context& context) const;

   private:
    const Kernels& kernels_;
    Prologue prologue_;
    float epsilon_;
};

}  // namespace fly
