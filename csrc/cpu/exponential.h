// SPDX-License-Identifier: MIT
// e^x of vectors of float64, to within two units in the last place.
#pragma once

#include "wide_rows.h"

namespace convnn::CONVNN_ISA {

// The degree of the polynomial for |r| <= ln 2 / 2: r^14 / 14! is less than 2^-57.
constexpr int kExponentialDegree = 13;

// 1 / i!
struct InverseFactorials {
  double of[kExponentialDegree + 1] = {1};
  constexpr InverseFactorials() {
    for (int i = 1; i <= kExponentialDegree; ++i) of[i] = of[i - 1] / i;
  }
};
inline constexpr InverseFactorials kInverseFactorials;

// For x <= 0 and NaN. With n the integer nearest to x / ln 2 and r = x - n ln 2, e^x = e^r 2^n.
inline Vector<double> exponential(Vector<double> x) {
  using Integers = decltype(x > x);
  constexpr double kLowest = -750;     // of which e^x is rounded to 0
  constexpr double kShift = 0x1.8p52;  // y + kShift has the integer nearest to y as last bits
  constexpr double kInverse = 0x1.71547652b82fep0;  // 1 / ln 2
  // ln 2 in two parts: the products of the first one with n are exact.
  constexpr double kHigh = 0x1.62e42feep-1, kLow = 0x1.a39ef35793c76p-33;

  x = x < kLowest ? Vector<double>{} + kLowest : x;
  const Vector<double> shifted = x * kInverse + kShift, n = shifted - kShift;
  const Vector<double> r = x - n * kHigh - n * kLow;
  Vector<double> sum = Vector<double>{} + kInverseFactorials.of[kExponentialDegree];
#pragma GCC unroll 16
  for (int i = kExponentialDegree - 1; i >= 0; --i) sum = sum * r + kInverseFactorials.of[i];

  // 2^n as two factors, because n may be less than the least exponent.
  Integers exponent, bias;
  const Vector<double> shift = Vector<double>{} + kShift;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bias, &shift, sizeof bias);
  exponent -= bias;
  const Integers half = exponent >> 1;
  const auto power = [](Integers e) {
    const Integers bits = (e + 1023) << 52;
    Vector<double> result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  };
  return sum * power(half) * power(exponent - half);
}

}  // namespace convnn::CONVNN_ISA
