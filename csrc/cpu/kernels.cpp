// SPDX-License-Identifier: MIT
// All CPU kernels for one instruction set, compiled once per set with CONVNN_ISA as its name.
#include "aggregate.h"
#include "aggregate_backward.h"
#include "select.h"
#include "select_backward.h"
#include "select_few.h"

namespace convnn::CONVNN_ISA {

#define CONVNN_STRING(x) #x
#define CONVNN_NAME(x) CONVNN_STRING(x)

const Kernels& kernels() {
  static const Kernels table = {
      CONVNN_NAME(CONVNN_ISA),
      {select_kernel<double>(), select_kernel<float>(), select_kernel<half>(),
       select_kernel<bfloat16>()},
      {few_queries_kernel<double>(), few_queries_kernel<float>(), few_queries_kernel<half>(),
       few_queries_kernel<bfloat16>()},
      {select_backward_kernel<double>(), select_backward_kernel<float>(),
       select_backward_kernel<half>(), select_backward_kernel<bfloat16>()},
      {aggregate_kernel<double>(), aggregate_kernel<float>(), aggregate_kernel<half>(),
       aggregate_kernel<bfloat16>()},
      {aggregate_backward_kernel<double>(), aggregate_backward_kernel<float>(),
       aggregate_backward_kernel<half>(), aggregate_backward_kernel<bfloat16>()},
  };
  return table;
}

}  // namespace convnn::CONVNN_ISA
