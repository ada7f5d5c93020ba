// SPDX-License-Identifier: MIT
// The CPU kernels for processors with AMX: those for VNNI, but for select, which multiplies its
// screen on AMX tiles.
#include "select.h"

namespace convnn::amx {

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels kernels = avx512vnni::kernels();
    kernels.instruction_set = "amx";
    kernels.select[int(DType::float32)] = select_kernel<float>();
    kernels.select[int(DType::float16)] = select_kernel<half>();
    kernels.select[int(DType::bfloat16)] = select_kernel<bfloat16>();
    return kernels;
  }();
  return table;
}

}  // namespace convnn::amx
