// SPDX-License-Identifier: MIT
// Element types, and sums of products as tensor cores compute them.
#include <algorithm>
#include <limits>

#include "fibers.h"

// The vector instructions of the machine that runs the tests.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FOR_THIS_MACHINE __attribute__((target_clones("avx2", "default")))
#else
#define FOR_THIS_MACHINE
#endif

namespace execution {
namespace {

constexpr int kTerms = 16, kBlock = 8;

float nan_of_device() { return same_bits<float>(0x7FFFFFFFu); }

// 2^(23 - e) for a largest term of exponent e, at most 2^149: float32 has no smaller unit.
double scale_for(double largest) {
  const uint64_t exponent = same_bits<uint64_t>(largest) >> 52;
  return same_bits<double>(std::min<uint64_t>(1023 + 23 + 1023 - exponent, 1023 + 149) << 52);
}
// x without what is beyond its 24th bit.
double truncated(double x) {
  return same_bits<double>(same_bits<uint64_t>(x) & ~((uint64_t(1) << 29) - 1));
}

}  // namespace

FOR_THIS_MACHINE
void multiply_row(float* d, const float* a, const float* b, int columns) {
  for (int first = 0; first < columns; first += kBlock) {
    double terms[kTerms + 1][kBlock], sums[kBlock], largest[kBlock], scale[kBlock];
    for (int j = 0; j < kBlock; ++j) {
      terms[kTerms][j] = sums[j] = double(d[first + j]);
      largest[j] = std::fabs(sums[j]);
    }
    for (int i = 0; i < kTerms; ++i) {
      for (int j = 0; j < kBlock; ++j) {
        const double term = double(a[i]) * double(b[i * columns + first + j]);
        const double size = std::fabs(term);
        terms[i][j] = term;
        sums[j] += term;
        largest[j] = size > largest[j] ? size : largest[j];
      }
    }
    // Infinities and NaN are their own sums.
    bool finite = true;
    for (int j = 0; j < kBlock; ++j) finite &= std::isfinite(sums[j]);
    for (int j = 0; j < kBlock && !finite; ++j) {
      if (std::isfinite(sums[j])) continue;
      for (double (&row)[kBlock] : terms) row[j] = 0;
      largest[j] = 0;
    }
    int32_t units[kBlock] = {};
    for (int j = 0; j < kBlock; ++j) scale[j] = scale_for(largest[j]);
    for (const double (&row)[kBlock] : terms) {
      for (int j = 0; j < kBlock; ++j) units[j] += int32_t(row[j] * scale[j]);
    }
    for (int j = 0; j < kBlock; ++j) {
      const double rounded = truncated(double(units[j]) / scale[j]);
      const double sum = largest[j] > 0 ? rounded : sums[j];
      d[first + j] = std::isnan(sum) ? nan_of_device() : float(sum);
    }
  }
}

float float_from_half(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return same_bits<float>(sign | 0x7F800000u | uint32_t(fraction) << 13);
  const float size = exponent ? std::ldexp(float(fraction + 1024), exponent - 25)
                              : std::ldexp(float(fraction), -24);
  return sign ? -size : size;
}

uint16_t half_from_float(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return uint16_t(sign | 0x7E00);
  // 65520 is halfway between the largest number and the next one.
  if (size >= 65520.0f) return uint16_t(sign | 0x7C00);
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  // In units of the last bit, rounded to even. A carry correctly increments the exponent.
  const auto units = uint16_t(std::nearbyint(std::ldexp(double(size), 10 - exponent)));
  return uint16_t(sign | (units + ((exponent + 14) << 10)));
}

uint16_t bfloat16_from_float(float x) {
  const uint32_t bits = same_bits<uint32_t>(x);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

namespace {

constexpr int kWarp = 32;

// A float from the 16 bits of a float16 or bfloat16 element.
float element(bool is_half, uint32_t pair, int which) {
  const uint16_t bits = uint16_t(which ? pair >> 16 : pair);
  return is_half ? float_from_half(bits) : same_bits<float>(uint32_t(bits) << 16);
}

struct Matrices {
  float a[16][16], b[16][8], d[16][8];
};

void multiply(Matrices& m) {
  for (int row = 0; row < 16; ++row) multiply_row(m.d[row], m.a[row], m.b[0], 8);
}

struct MatrixOperand {
  bool is_half;
  float* d;
  const uint32_t *a, *b;
};

// Fragments as the PTX manual defines them for mma.m16n8k16: register i of lane 4 group + member.
int row_of_d(int group, int i) { return i < 2 ? group : group + 8; }
int column_of_d(int member, int i) { return 2 * member + (i & 1); }

void read_d(Matrices& m, void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      m.d[row_of_d(lane / 4, i)][column_of_d(lane % 4, i)] =
          static_cast<MatrixOperand*>(lanes[lane])->d[i];
    }
  }
}
void write_d(const Matrices& m, void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      static_cast<MatrixOperand*>(lanes[lane])->d[i] =
          m.d[row_of_d(lane / 4, i)][column_of_d(lane % 4, i)];
    }
  }
}

void combine_16(void* const* lanes) {
  Matrices m;
  read_d(m, lanes);
  for (int lane = 0; lane < kWarp; ++lane) {
    const MatrixOperand& own = *static_cast<MatrixOperand*>(lanes[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = 2 * member + (i & 1) + (i >= 4 ? 8 : 0);
      m.a[row][column] = element(own.is_half, own.a[i / 2], i & 1);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * member + (i & 1) + (i >= 2 ? 8 : 0);
      m.b[row][group] = element(own.is_half, own.b[i / 2], i & 1);
    }
  }
  multiply(m);
  write_d(m, lanes);
}

}  // namespace

void multiply_accumulate_16(bool is_half, float (&d)[4], const uint32_t (&a)[4],
                            const uint32_t (&b)[2], Site site) {
  MatrixOperand operand = {is_half, d, a, b};
  collective(site, &operand, combine_16);
}

}  // namespace execution
