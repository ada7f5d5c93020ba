// SPDX-License-Identifier: MIT
// Which of the compiled instruction sets the operators use.
#pragma once

#include "kernels.h"

namespace convnn::cpu {

// The kernels of the best instruction set that was built and that this processor has, or of the one
// that the environment variable CONVNN_CPU_ISA names. The choice is made once per process. Throws
// std::runtime_error if the named one cannot run.
const Kernels& kernels();

}  // namespace convnn::cpu
