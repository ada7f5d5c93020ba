// SPDX-License-Identifier: MIT
// The normalization of the cosine (section 4.1 of the paper): x^ = x / ||x||, or 0 where
// ||x|| <= epsilon.
#pragma once

#include <cmath>
#include <type_traits>

#include "../params.h"
#include "register_tile.h"

namespace convnn::CONVNN_ISA {

// x^ = (x * factor) * inverse; inverse is 0 only for a row of norm <= epsilon. The factor is a
// power of two that keeps the squares of large float64 rows finite; other types are squared in
// float64, where they cannot overflow.
struct Normalizer {
  double factor = 1;
  double inverse = 1;

  template <class T>
  accumulate_t<T> operator()(T x) const {
    return accumulate_t<T>(double(widen(x)) * factor * inverse);
  }
  double inverse_norm() const { return factor * inverse; }
};

// x [d]
template <class T>
inline Normalizer normalizer(const T* x, int64_t d) {
  Normalizer result;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < d; ++i) {
      if (std::fabs(x[i]) > 0x1p500) result.factor = 0x1p-600;
    }
  }
  const double factor = result.factor;
  const double sum = sum_of(d, [&](int64_t i) {
    const double scaled = double(widen(x[i])) * factor;
    return scaled * scaled;
  });
  const double norm = std::sqrt(sum);  // times factor
  result.inverse = norm <= kCosineEpsilon * factor ? 0.0 : 1.0 / norm;
  if (std::isinf(norm)) result.inverse = std::numeric_limits<double>::quiet_NaN();  // inf / inf
  return result;
}

}  // namespace convnn::CONVNN_ISA
