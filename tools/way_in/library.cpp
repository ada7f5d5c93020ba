// SPDX-License-Identifier: MIT
// The way in to the Hopper kernels (csrc/cuda/way_in.h) for CPU tensors, over kernels that do no
// more than tell that they ran: an output is full of 7 by those for Hopper, and of 5 by the
// portable ones. It stands in for libconvnn_cuda.so in tests/test_cuda_way_in.py and
// tools/host_time.py.
#include "../../csrc/cuda/way_in.h"

namespace convnn::cuda {

const char* hopper_refuses(const SelectParams& select, const AggregateParams*) {
  if (select.dtype != DType::float16 && select.dtype != DType::bfloat16) return "not of 16 bits";
  if (select.self_indices) return "self_indices are given";
  if (select.key_range) return "key_range is given";
  return select.candidates_stride ? "candidates are those of each batch element" : nullptr;
}

// Takes the workspace of the kernels: a copy of the keys, three factors a row, hits, their counts.
void hopper_forward(const SelectParams& p, const AggregateParams*, Context& context,
                    HopperChoices) {
  context.allocate(size_t(p.batch * p.m * p.d) * 2);
  for (const int64_t rows : {p.m, p.m, p.n}) context.allocate(size_t(p.batch * rows) * 4);
  context.allocate(size_t(p.batch * p.n) * 64 * 8);
  context.allocate(size_t(p.batch * p.n) * 4);
}

}  // namespace convnn::cuda

namespace convnn::torch_operators {
namespace {

// Only the first one: all would take longer than what is measured.
template <class T>
void write(void* memory, T value) {
  if (memory) *static_cast<T*>(memory) = value;
}

class Host : protected cuda::Context {
 public:
  static constexpr bool kReadsIndices = false;
  static constexpr bool kReadsStrides = false;

  explicit Host(const Tensor& like) : Context(nullptr), workspace_(like) {}
  static int device(int32_t type, int32_t) { return type == aoti_torch_device_type_cpu() ? 0 : -1; }

  void select(const SelectParams& params) {
    const bool hopper = runs_on_hopper(Operator::select, params, nullptr);
    if (hopper) cuda::hopper_forward(params, nullptr, *this);
    tell(params, hopper);
  }
  void forward(const SelectParams& select, const AggregateParams& aggregate) {
    const bool hopper = runs_on_hopper(Operator::forward, select, &aggregate);
    if (hopper) cuda::hopper_forward(select, &aggregate, *this);
    tell(select, hopper);
  }

 protected:
  static void tell(const SelectParams& p, bool hopper) {
    if (p.batch * p.n == 0) return;
    write(p.similarities, hopper ? 7.0f : 5.0f);
    write(p.indices, int64_t(0));
  }

 private:
  bool runs_on_hopper(Operator op, const SelectParams& select, const AggregateParams* aggregate) {
    return cuda::is_right(0, op, cuda::hopper_kind(select)) &&
           !cuda::hopper_refuses(select, aggregate);
  }
  void* allocate(size_t bytes) override { return workspace_.allocate(bytes); }

  Workspace workspace_;
};

}  // namespace
}  // namespace convnn::torch_operators

STABLE_TORCH_LIBRARY(convnn_cuda, library) {
  convnn::torch_operators::define(library);
  convnn::torch_operators::define_questions(library);
}
STABLE_TORCH_LIBRARY(convnn_python, library) { convnn::torch_operators::define_python(library); }

STABLE_TORCH_LIBRARY_IMPL(convnn_cuda, CPU, library) {
  using namespace convnn::torch_operators;
  library.impl("forward", &Boxed<kForward, &forward<Host>>::call);
  library.impl("select", &Boxed<kSelect, &select<Host>>::call);
  implement_hopper<Host>(library);
}
// On any device, because only shapes and dtypes count.
STABLE_TORCH_LIBRARY_IMPL(convnn_cuda, CompositeExplicitAutograd, library) {
  convnn::torch_operators::implement_choices(library);
}
STABLE_TORCH_LIBRARY_IMPL(convnn, CPU, library) {
  convnn::torch_operators::implement_way_in<convnn::torch_operators::Host>(library);
}
