// Whether a kind's kernels are right on this machine: some processors' units were not at hand where they were written.
#pragma once

#include "kernels.h"

namespace fly {

// Compares a small product, rounded rows and attention with plain loops; takes less than a millisecond.
bool computes_rightly(const Kernels& kernels);

}  // namespace fly
