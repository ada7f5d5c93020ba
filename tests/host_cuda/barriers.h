// SPDX-License-Identifier: MIT
// How copies meet the barriers that they complete at.
#pragma once

#include "execution.h"

namespace execution {

// A copy begins: returns the phase of the barrier that it belongs to.
int64_t begin_copy(uint64_t* bar, Site site);
void complete_copy(uint64_t* bar, int bytes, int64_t phase, Site site);

}  // namespace execution
