// SPDX-License-Identifier: MIT
#include "backward.h"

namespace convnn::cuda {

void select_backward(const SelectBackwardParams& p, Context& context) {
  if (p.batch) gradients(nullptr, &p, context);
}

}  // namespace convnn::cuda
