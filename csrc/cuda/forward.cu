// SPDX-License-Identifier: MIT
#include "hopper.h"

namespace convnn::cuda {

void forward(const SelectParams& p, const AggregateParams& a, Context& context) {
  if (!hopper_refuses(p, &a)) {
    HopperChoices choices;
    choices.portable = true;
    hopper_forward(p, &a, context, choices);
  } else {
    select(p, context);
    aggregate(a, context);
  }
}

}  // namespace convnn::cuda
