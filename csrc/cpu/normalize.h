// SPDX-License-Identifier: MIT
// The normalization of the cosine (section 4.1 of the paper): x^ = x / ||x||, or 0 where
// ||x|| <= epsilon.
#pragma once

#include <cmath>
#include <type_traits>

#include "../params.h"
#include "wide_rows.h"

namespace convnn::CONVNN_ISA {

// x^ = (x * factor) * inverse; inverse is 0 only for a row of norm <= epsilon. The factor is a
// power of two that keeps the squares of large float64 rows finite; it is 1 for other types, whose
// squares cannot overflow in float64.
struct Normalizer {
  double factor = 1;
  double inverse = 1;

  // to [d] = x^ of x [d]
  template <class T>
  void normalize(const T* x, int64_t d, accumulate_t<T>* to) const {
    each_block<4>(d, [&](auto block, int64_t first) {
#pragma GCC unroll 4
      for (int v = 0; v < block.kVectors; ++v) {
        Vector<double> wide = block.load(x + first, v);
        if constexpr (std::is_same_v<T, double>) wide *= factor;
        block.store(to + first, wide * inverse, v);
      }
    });
  }
  double inverse_norm() const { return factor * inverse; }
};

// x [d]
template <class T>
inline Normalizer normalizer_of(const T* x, int64_t d) {
  Normalizer result;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < d; ++i) {
      if (std::fabs(x[i]) > 0x1p500) result.factor = 0x1p-600;
    }
  }
  const double factor = result.factor;
  const double sum = sum_of(d, [&](auto block, int64_t i) {
    Vector<double> scaled = block.load(x + i);
    if constexpr (std::is_same_v<T, double>) scaled *= factor;
    return scaled * scaled;
  });
  const double norm = std::sqrt(sum);  // times factor
  result.inverse = norm <= kCosineEpsilon * factor ? 0.0 : 1.0 / norm;
  if (std::isinf(norm)) result.inverse = std::numeric_limits<double>::quiet_NaN();  // inf / inf
  return result;
}

}  // namespace convnn::CONVNN_ISA
