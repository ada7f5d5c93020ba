// SPDX-License-Identifier: MIT
// Element types and SIMD vectors of one instruction set. Compiled once per instruction set, in the
// namespace CONVNN_ISA, so that no code of one set is linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "guard.h"

namespace convnn::CONVNN_ISA {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// The type of sums over elements of T.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(half x) {
  // The exponent moves from bias 15 to bias 127 by one exact product, subnormals included.
  const float magnitude = float_of(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // inf and NaN
  return float_of(bits_of(magnitude) | special | (uint32_t(x.bits & 0x8000) << 16));
}

// Rounds to nearest, ties to even.
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bfloat16& out) {
  const uint32_t bits = bits_of(x);
  out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, half& out) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t rounded;
  if (magnitude >= 0x47800000) {  // 65536 and above, inf, NaN
    rounded = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded bits at the end
    rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    rounded = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out.bits = uint16_t(rounded | ((bits >> 16) & 0x8000));
}

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A>
inline Vector<A> load(const A* from) {
  Vector<A> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class A>
inline void store(A* to, Vector<A> x) {
  std::memcpy(to, &x, sizeof x);
}

// A whole vector of float64 from or to memory. Without intrinsics, GCC converts floats in halves;
// of the intrinsics, those without a mask warn.
inline Vector<double> load_wide(const double* from) { return load(from); }
inline void store_narrow(double* to, Vector<double> x) { store(to, x); }
#if defined(__AVX512F__)
inline Vector<double> load_wide(const float* from) {
  return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from));
}
inline Vector<double> load_wide(const half* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_maskz_cvtps_pd(0xff, _mm256_cvtph_ps(bits));
}
inline Vector<double> load_wide(const bfloat16* from) {
  // The bits of float32, by one shuffle within the halves of a vector.
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i to_high =
      _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                       -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  const __m256i wide = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bits), to_high);
  return _mm512_maskz_cvtps_pd(0xff, _mm256_castsi256_ps(wide));
}
inline void store_narrow(float* to, Vector<double> x) {
  _mm256_storeu_ps(to, _mm512_maskz_cvtpd_ps(0xff, x));
}
#elif defined(__AVX2__)
inline Vector<double> load_wide(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
inline Vector<double> load_wide(const half* from) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Vector<double> load_wide(const bfloat16* from) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i to_high = _mm_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7);
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_shuffle_epi8(bits, to_high)));
}
inline void store_narrow(float* to, Vector<double> x) { _mm_storeu_ps(to, _mm256_cvtpd_ps(x)); }
#else
typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));
template <class T>
inline Vector<double> load_wide(const T* from) {
  HalfVector x = {};
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = widen(from[lane]);
  return __builtin_convertvector(x, Vector<double>);
}
inline void store_narrow(float* to, Vector<double> x) {
  const HalfVector narrow = __builtin_convertvector(x, HalfVector);
  std::memcpy(to, &narrow, sizeof narrow);
}
#endif
// Both round to float32 first, as all results of these types are.
inline void store_narrow(bfloat16* to, Vector<double> x) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 4)));
  float rounded[kLanes<double>];
  store_narrow(rounded, x);
  Bits bits;
  std::memcpy(&bits, rounded, sizeof bits);
  const auto is_nan = (bits & 0x7fffffff) > 0x7f800000;
  bits = is_nan ? Bits{} + 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Halves halves = __builtin_convertvector(bits, Halves);
  std::memcpy(to, &halves, sizeof halves);
}
inline void store_narrow(half* to, Vector<double> x) {
  float rounded[kLanes<double>];
  store_narrow(rounded, x);
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(rounded), 0));
#elif defined(__AVX2__)
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(_mm_loadu_ps(rounded), 0));
#else
  for (int lane = 0; lane < kLanes<double>; ++lane) narrow(rounded[lane], to[lane]);
#endif
}

// x in every lane.
template <class A>
inline Vector<A> broadcast(A x) {
  return x - Vector<A>{};  // unlike x + 0, this is x also for -0, so nothing is computed
}

// The sum of the lanes.
inline float sum_of_lanes(Vector<float> x) {
#if defined(__AVX512F__)
  const __m256 eight =
      _mm512_maskz_extractf32x8_ps(0xff, x, 0) + _mm512_maskz_extractf32x8_ps(0xff, x, 1);
#elif defined(__AVX2__)
  const __m256 eight = x;
#endif
#if defined(__AVX2__)
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#else
  const Vector<float> four = x;
#endif
  return four[0] + four[2] + (four[1] + four[3]);
}
inline double sum_of_lanes(Vector<double> x) {
#if defined(__AVX512F__)
  const __m256d four =
      _mm512_maskz_extractf64x4_pd(0xf, x, 0) + _mm512_maskz_extractf64x4_pd(0xf, x, 1);
  const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
#elif defined(__AVX2__)
  const __m128d two = _mm256_castpd256_pd128(x) + _mm256_extractf128_pd(x, 1);
#else
  const Vector<double> two = x;
#endif
  return two[0] + two[1];
}

// One step of `transpose`: swaps lanes of two rows that are Step apart. J: 0 ... kLanes - 1.
template <class A, int Step, int... J>
inline void exchange(Vector<A>& upper, Vector<A>& lower, std::integer_sequence<int, J...>) {
  const Vector<A> first = upper, second = lower;
#if defined(__clang__)
  upper = __builtin_shufflevector(first, second, (J & Step ? kLanes<A> + J - Step : J)...);
  lower = __builtin_shufflevector(first, second, (J & Step ? kLanes<A> + J : J + Step)...);
#else  // GCC has __builtin_shufflevector only from version 12 on
  using Indices = decltype(Vector<A>{} > Vector<A>{});
  upper = __builtin_shuffle(first, second, Indices{(J & Step ? kLanes<A> + J - Step : J)...});
  lower = __builtin_shuffle(first, second, Indices{(J & Step ? kLanes<A> + J : J + Step)...});
#endif
}

// Swaps lane j of row i and lane i of row j.
template <class A, int Step = 1>
inline void transpose(Vector<A> (&rows)[kLanes<A>]) {
  if constexpr (Step < kLanes<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) {
      if (i & Step) continue;
      exchange<A, Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kLanes<A>>());
    }
    transpose<A, 2 * Step>(rows);
  }
}

// The sign bits of the lanes, lane 0 lowest: for the result of a comparison, where it is true.
#if defined(__AVX512F__)
inline uint32_t lane_bits(Vector<float> a) { return _mm512_movepi32_mask(_mm512_castps_si512(a)); }
inline uint32_t lane_bits(Vector<double> a) { return _mm512_movepi64_mask(_mm512_castpd_si512(a)); }
#elif defined(__AVX2__)
inline uint32_t lane_bits(Vector<float> a) { return uint32_t(_mm256_movemask_ps(a)); }
inline uint32_t lane_bits(Vector<double> a) { return uint32_t(_mm256_movemask_pd(a)); }
#elif defined(__x86_64__)
inline uint32_t lane_bits(Vector<float> a) { return uint32_t(_mm_movemask_ps(a)); }
inline uint32_t lane_bits(Vector<double> a) { return uint32_t(_mm_movemask_pd(a)); }
#else
template <class V>
inline uint32_t lane_bits(V a) {
  constexpr int kSize = int(sizeof(a[0]));
  unsigned char bytes[kVectorBytes];
  std::memcpy(bytes, &a, sizeof bytes);
  uint32_t bits = 0;
  for (int lane = 0; lane < kVectorBytes / kSize; ++lane) {
    bits |= uint32_t(bytes[lane * kSize + kSize - 1] >> 7) << lane;
  }
  return bits;
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// For eight bits, the positions of those that are set, ascending.
struct SetBits {
  alignas(8) uint8_t positions[256][8] = {};
  constexpr SetBits() {
    for (int bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (uint8_t bit = 0; bit < 8; ++bit) {
        if (bits >> bit & 1) positions[bits][count++] = bit;
      }
    }
  }
};
inline constexpr SetBits kSetBits;
#endif

// Writes first + lane for every lane whose bit is set, ascending. Returns how many; `to` must have
// room for kLanes.
template <class A>
inline int64_t list_lanes(uint32_t bits, int32_t first, int32_t* to) {
#if defined(__AVX512F__)
  if constexpr (kLanes<A> == 16) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i positions = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(bits), positions));
    return __builtin_popcount(bits);
  }
#elif defined(__AVX2__)
  if constexpr (kLanes<A> == 8) {
    int64_t positions;
    std::memcpy(&positions, kSetBits.positions[bits], sizeof positions);
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(positions));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_add_epi32(lanes, _mm256_set1_epi32(first)));
    return __builtin_popcount(bits);
  }
#endif
  int64_t count = 0;
  for (; bits; bits &= bits - 1) to[count++] = first + __builtin_ctz(bits);
  return count;
}

// Divides a block of memory into typed arrays. For a null block it only counts the bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    const size_t bytes = size_t(count) * sizeof(T);
    used_ += (bytes + kGap + 63) / 64 * 64;
    if (base_) {
      release(at, at + bytes);  // another division of the block may have had a gap there
      guard(at + bytes, base_ + used_);
    }
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace convnn::CONVNN_ISA
