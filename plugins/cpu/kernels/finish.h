// From the sums of a product to the output of the layer. For the file of each kind of lanes.
#pragma once

#include "kernels.h"

namespace fly {
namespace {

// `sums`: of a row at the 16 outputs of a block, with the weights' offset still in them.
inline void finish(
    const int32_t* sums, const Rows& rows, size_t row, const PackedWeight& weight, size_t block, float* output) {
    const size_t column = block * kBlock, n = weight.outputs - column;
    const Lanes total = Lanes::of_integers(sums, kWeightOffset * rows.sums[row]);
    Lanes y = total * Lanes::load(weight.scales + column, n) * Lanes::all(rows.scales[row]);
    if (weight.bias != nullptr) y = y + Lanes::load(weight.bias + column, n);
    const size_t at = row * weight.outputs + column;
    if (weight.residual != nullptr) y = y + Lanes::load(weight.residual + at, n);
    y.store(output + at, n);
}

}  // namespace
}  // namespace fly
