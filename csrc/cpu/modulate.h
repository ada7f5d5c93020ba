// SPDX-License-Identifier: MIT
// The modulation rho of section 4.1 and its derivative, in float64.
#pragma once

#include "../params.h"
#include "exponential.h"

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

// rho [rows, k] of rows of similarities, which are -inf where they are missing: 0 there.
template <class S>
inline void softmax(const S* similarities, int64_t rows, int64_t k, double scale, double* rho) {
  constexpr double kLowest = -std::numeric_limits<double>::infinity();
  for (int64_t r = 0; r < rows; ++r) {
    const S* s = similarities + r * k;
    double largest = kLowest;  // of the similarities, or of their negatives if scale is negative
    for (int64_t j = 0; j < k; ++j) {
      const double x = is_missing(s[j]) ? kLowest : scale < 0 ? -double(s[j]) : double(s[j]);
      largest = x > largest ? x : largest;
    }
    // Subtracting similarities before the product with the scale, rather than products, loses
    // nothing to a scale of any size; halves of them, because their difference may exceed float64.
    const double nearest = largest == kLowest ? 0 : scale < 0 ? -largest : largest;
    for (int64_t j = 0; j < k; ++j) {
      const double x = 2 * (scale * (0.5 * double(s[j]) - 0.5 * nearest));
      rho[r * k + j] = is_missing(s[j]) ? kLowest : x;
    }
  }
  each_block<4>(rows * k, [&](auto block, int64_t first) {
#pragma GCC unroll 4
    for (int v = 0; v < block.kVectors; ++v) {
      block.store(rho + first, exponential(block.load(rho + first, v)), v);
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += rho[r * k + j];
    const double inverse = 1 / sum;
    for (int64_t j = 0; j < k; ++j) {
      rho[r * k + j] = is_missing(similarities[r * k + j]) ? 0 : rho[r * k + j] * inverse;
    }
  }
}

// rho [rows, k] of rows of p.similarities, from row `first` on; 0 for a missing neighbor.
inline void modulate(const AggregateParams& p, int64_t first, int64_t rows, double* rho) {
  if (p.rho == Rho::softmax && p.similarity_dtype == DType::float64) {
    softmax(static_cast<const double*>(p.similarities) + first * p.k, rows, p.k, p.scale, rho);
  } else if (p.rho == Rho::softmax) {
    softmax(static_cast<const float*>(p.similarities) + first * p.k, rows, p.k, p.scale, rho);
  } else {
    for (int64_t i = 0; i < rows * p.k; ++i) {
      const double s = similarity_at(p, first * p.k + i);
      rho[i] = is_missing(s) ? 0 : p.rho == Rho::ones ? 1 : s;
    }
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
