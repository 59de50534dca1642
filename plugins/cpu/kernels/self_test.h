// Whether a kind's product is right on this machine: some processors' units were not at hand where it was written.
#pragma once

#include "kernels.h"

namespace fly {

// Compares a small product with plain sums; takes less than a millisecond.
bool multiplies_rightly(const Kernels& kernels);

}  // namespace fly
