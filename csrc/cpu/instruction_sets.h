// SPDX-License-Identifier: MIT
// Which of the compiled instruction sets the operators use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace convnn::cpu {

// The kernels that the process uses: of the instruction set that use_instruction_set() named, or
// else the one that the environment variable CONVNN_CPU_ISA names, or else the best that was built
// and that this processor has. Of the last two, the choice is made once per process. Throws
// std::runtime_error if the one that the variable names cannot run.
const Kernels& kernels();

// Has all threads use the instruction set of this name from their next operator on; null ends that.
// Returns whether it can run here. `before` receives the name that this replaces, or null.
bool use_instruction_set(const char* name, const char** before);

// The instruction sets that run here, best first.
const std::vector<std::string>& usable_instruction_sets();

}  // namespace convnn::cpu
