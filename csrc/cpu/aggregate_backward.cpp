// SPDX-License-Identifier: MIT
#include "backward.h"
#include "instruction_sets.h"
#include "inverse_list.h"
#include "parallel.h"

namespace convnn::cpu {
namespace {

bool is_dense(const AggregateBackwardParams& p) {
  return p.forward.convolution == Convolution::dense && p.forward.c > 0;
}
// Without channels, nothing but the bias is convolved.
AggregateBackwardParams simplified(AggregateBackwardParams p) {
  if (p.forward.c == 0) p.forward.convolution = Convolution::none;
  return p;
}
bool needs_grad_rho(const AggregateBackwardParams& p) {
  return p.grad_similarities && p.forward.rho != Rho::ones;
}
// The weight enters the gradients of value and rho.
bool needs_weight(const AggregateBackwardParams& p) { return p.grad_value || needs_grad_rho(p); }

size_t rho_bytes(const AggregateBackwardParams& p) {
  return bytes_of(p.forward.batch, p.forward.n, p.forward.k, sizeof(double));
}

// One call: what its passes read and what they share.
class Call {
 public:
  Call(const AggregateBackwardParams& params, const InverseList& inverse, ParallelFor parallel_for)
      : p_(params),
        f_(params.forward),
        kernel_(kernels().aggregate_backward[int(f_.dtype)]),
        inverse_(inverse),
        parallel_for_(parallel_for),
        scratch_bytes_(kernel_.scratch_bytes(p_)),
        weight_(needs_weight(p_) ? kernel_.packed_weight_bytes(p_) : 0, "the packed weight"),
        rho_(p_.grad_value || (is_dense(p_) && (p_.grad_weight || needs_weight(p_))) ? rho_bytes(p_)
                                                                                     : 0,
             "rho of each pair"),
        weight_parts_(p_.grad_weight
                          ? bytes_of(kernel_.weight_parts(p_), f_.k, elements(), sizeof(double))
                          : 0,
                      "partial sums of grad_weight") {
    if (needs_weight(p_)) pack_weight();
  }

  void run_passes() const {
    if (rho() || p_.grad_similarities || p_.grad_weight) query_rows();
    if (is_dense(p_) && needs_weight(p_)) {
      dense_pairs();
    } else if (p_.grad_value) {
      key_rows();
    }
    if (p_.grad_weight) weight_gradient();
    if (p_.grad_bias) bias_gradient();
  }

 private:
  double* rho() const { return rho_.as<double>(); }
  // Of each slot of grad_weight.
  int64_t elements() const { return (is_dense(p_) ? f_.o : 1) * f_.c; }

  void pack_weight() const {
    const int64_t tasks = kernel_.pack_tasks(p_);
    const double elements = double(f_.c * f_.k) * double(is_dense(p_) ? f_.o : 1);
    run(parallel_for_, tasks, elements / double(tasks),
        [&](int64_t begin, int64_t end) { kernel_.pack_weight(p_, weight_.get(), begin, end); });
  }

  // rho, and without a dense convolution grad_similarities and the parts of grad_weight.
  void query_rows() const {
    const int64_t tasks = kernel_.query_tasks(p_);
    double* const parts = is_dense(p_) ? nullptr : weight_parts_.as<double>();
    run(parallel_for_, tasks,
        double(f_.batch * f_.n) / double(tasks) * double(f_.k * (is_dense(p_) ? 1 : f_.c)),
        scratch_bytes_, [&](int64_t begin, int64_t end, void* scratch) {
          kernel_.query_rows(p_, weight_.get(), rho(), parts, begin, end, scratch);
        });
  }

  // grad_value without a dense convolution.
  void key_rows() const {
    run(parallel_for_, f_.batch * ceil_div(f_.m, kernel_.key_rows_per_task),
        double(kernel_.key_rows_per_task * f_.k * f_.c), [&](int64_t begin, int64_t end) {
          kernel_.key_rows(p_, inverse_, weight_.get(), rho(), begin, end);
        });
  }

  // grad_value and grad_similarities of a dense convolution.
  void dense_pairs() const {
    const int64_t tasks = kernel_.pair_tasks(p_);
    const Workspace grad_rho_workspace(needs_grad_rho(p_) ? rho_bytes(p_) : 0,
                                       "the gradient of rho");
    const Workspace cuts_workspace(
        p_.grad_value ? bytes_of(f_.batch, tasks, 2, f_.c, sizeof(double)) : 0,
        "partial sums of grad_value");
    double* const grad_rho = grad_rho_workspace.as<double>();
    double* const cuts = cuts_workspace.as<double>();
    run(parallel_for_, f_.batch * tasks, double(f_.n * f_.k) / double(tasks) * double(f_.c * f_.o),
        scratch_bytes_, [&](int64_t begin, int64_t end, void* scratch) {
          kernel_.pairs(p_, inverse_, weight_.get(), rho(), grad_rho, cuts, begin, end, scratch);
        });
    if (p_.grad_value) {
      run(parallel_for_, f_.batch, double(tasks * f_.c),
          [&](int64_t begin, int64_t end) { kernel_.cut_keys(p_, inverse_, cuts, begin, end); });
    }
    if (needs_grad_rho(p_)) {
      run(parallel_for_, f_.batch * f_.n, double(f_.k), [&](int64_t begin, int64_t end) {
        kernel_.similarities(p_, rho(), grad_rho, begin, end);
      });
    }
  }

  void weight_gradient() const {
    const int64_t parts = kernel_.weight_parts(p_);
    double* const sums = weight_parts_.as<double>();
    if (is_dense(p_)) {
      run(parallel_for_, kernel_.weight_tasks(p_),
          double(f_.batch * f_.n) / double(parts) * double(f_.o) * 64, scratch_bytes_,
          [&](int64_t begin, int64_t end, void* scratch) {
            kernel_.weight(p_, rho(), sums, begin, end, scratch);
          });
    }
    run(parallel_for_, elements(), double(parts * f_.k),
        [&](int64_t begin, int64_t end) { kernel_.sum_weight(p_, sums, begin, end); });
  }

  void bias_gradient() const {
    run(parallel_for_, kernel_.bias_tasks(p_), double(f_.batch * f_.n) * 64,
        [&](int64_t begin, int64_t end) { kernel_.bias(p_, begin, end); });
  }

  const AggregateBackwardParams& p_;
  const AggregateParams& f_;
  const AggregateBackwardKernel& kernel_;
  const InverseList inverse_;
  const ParallelFor parallel_for_;
  const size_t scratch_bytes_;
  const Workspace weight_, rho_, weight_parts_;
};

}  // namespace

bool needs_inverse_list(const AggregateBackwardParams& p) {
  return p.grad_value || (is_dense(p) && needs_weight(p));
}

void aggregate_backward(const AggregateBackwardParams& params, const InverseList& inverse,
                        ParallelFor parallel_for) {
  const AggregateBackwardParams p = simplified(params);
  Call(p, inverse, parallel_for).run_passes();
}

void aggregate_backward(const AggregateBackwardParams& p, ParallelFor parallel_for) {
  OwnedInverseList inverse;
  if (needs_inverse_list(p)) inverse = invert(p.forward, parallel_for);
  aggregate_backward(p, inverse.view(), parallel_for);
}

}  // namespace convnn::cpu
