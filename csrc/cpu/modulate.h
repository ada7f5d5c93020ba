// SPDX-License-Identifier: MIT
// The modulation rho of section 4.1 and its derivative, one query row at a time, in float64.
#pragma once

#include <cmath>

#include "vector.h"

namespace convnn::CONVNN_ISA {

// a b + c, rounded once if the processor can. A compiler that vectorizes such a sum as written may
// round it once for one instruction set and twice for another.
inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline double similarity_at(const AggregateParams& p, int64_t entry) {
  return p.similarity_dtype == DType::float64 ? static_cast<const double*>(p.similarities)[entry]
                                              : static_cast<const float*>(p.similarities)[entry];
}

// A similarity of -inf marks a missing neighbor, which is ignored for every rho.
inline bool is_missing(double similarity) {
  return similarity == -std::numeric_limits<double>::infinity();
}

// rho [k] of the row of p.similarities that starts at entry `first`; 0 for a missing neighbor.
inline void modulate(const AggregateParams& p, int64_t first, double* rho) {
  if (p.rho != Rho::softmax) {
    for (int64_t j = 0; j < p.k; ++j) {
      const double s = similarity_at(p, first + j);
      rho[j] = is_missing(s) ? 0 : p.rho == Rho::ones ? 1 : s;
    }
    return;
  }
  // Of the greatest product with the scale. Subtracting similarities before that, rather than
  // products, loses nothing to a scale of any size; halves of them, because their difference may
  // exceed float64.
  double nearest = 0, largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < p.k; ++j) {
    const double s = similarity_at(p, first + j), sign = p.scale < 0 ? -s : s;
    if (!is_missing(s) && sign > largest) nearest = s, largest = sign;
  }
  double sum = 0;
  for (int64_t j = 0; j < p.k; ++j) {
    const double s = similarity_at(p, first + j);
    rho[j] = is_missing(s) ? 0 : std::exp(2 * (p.scale * (0.5 * s - 0.5 * nearest)));
    sum += rho[j];
  }
  for (int64_t j = 0; j < p.k; ++j) {
    if (!is_missing(similarity_at(p, first + j))) rho[j] /= sum;
  }
}

// grad_similarities of one row from grad_rho [k] and rho [k].
inline void modulate_backward(const AggregateBackwardParams& p, int64_t first, const double* rho,
                              const double* grad_rho) {
  const AggregateParams& f = p.forward;
  double mean = 0;  // softmax: sum over j of rho_j grad_rho_j
  if (f.rho == Rho::softmax) {
    for (int64_t j = 0; j < f.k; ++j) {
      if (!is_missing(similarity_at(f, first + j))) mean = multiply_add(rho[j], grad_rho[j], mean);
    }
  }
  for (int64_t j = 0; j < f.k; ++j) {
    double grad = 0;
    if (!is_missing(similarity_at(f, first + j))) {
      if (f.rho == Rho::softmax) grad = f.scale * rho[j] * (grad_rho[j] - mean);
      if (f.rho == Rho::similarity) grad = grad_rho[j];
    }
    if (f.similarity_dtype == DType::float64) {
      static_cast<double*>(p.grad_similarities)[first + j] = grad;
    } else {
      static_cast<float*>(p.grad_similarities)[first + j] = float(grad);
    }
  }
}

}  // namespace convnn::CONVNN_ISA
