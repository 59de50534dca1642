// From the sums of a product to the output of the layer. For the file of each kind of lanes.
#pragma once

#include "kernels.h"

namespace fly {
namespace {

// `total`: a row's sums at the 16 outputs of a block, as floats.
inline void finish(Lanes total, const Rows& rows, size_t row, const PackedWeight& weight, size_t block, float* output) {
    const size_t column = block * kBlock, n = weight.outputs - column;
    Lanes y = total * Lanes::load(weight.scales + column, n) * Lanes::all(rows.scales[row]);
    if (weight.bias != nullptr) y = y + Lanes::load(weight.bias + column, n);
    const size_t at = row * weight.outputs + column;
    if (weight.residual != nullptr) y = y + Lanes::load(weight.residual + at, n);
    y.store(output + at, n);
}

}  // namespace
}  // namespace fly
