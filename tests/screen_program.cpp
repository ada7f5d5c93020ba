// SPDX-License-Identifier: MIT
// For tests/test_screen_bound.py: screened and exact similarities of rows whose rounding errors are
// as unfavorable as can be, against the bound of a screen. SCREEN: one of screen.h or screen_amx.h,
// for rows of ELEMENT.
#define CONVNN_ISA screened

#include <algorithm>
#include <random>
#include <vector>

#include "../csrc/cpu/normalize.h"
#include "../csrc/cpu/screen.h"
#include "../csrc/cpu/screen_amx.h"

namespace convnn::screened {
namespace {

using Screen = SCREEN;
using Element = ELEMENT;
using Values = std::vector<double>;

std::mt19937_64 generator(0);

double between(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}
double normal() { return std::normal_distribution<double>()(generator); }

double product_of(const Values& x, const Values& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

// x and a random row, at most about this far from x if the norm of x is 1.
Values near(const Values& x, double distance) {
  Values result = x;
  for (double& element : result) element += distance * normal() / std::sqrt(double(x.size()));
  return result;
}

// What the errors of rounded rows are parallel to, as nearly as can be.
enum Errors { any, along, across };  // the row itself; the part of the other one orthogonal to it

// Rows whose rounding errors are unfavorable for FixedPointScreen: in about the direction of x, a
// row of integers plus almost 1/2 or -1/2 in units of its scale. Element 0 gives the row its norm,
// and most of it if it is `dominated`.
template <class S>
Values halfway(const Values& x, const Values& other, Errors errors, bool dominated) {
  const double d = double(x.size());
  const double unit = dominated ? S::kElement : S::largest_norm(int64_t(d));
  const double norm = unit / 1.000001 / std::sqrt(1 + 0x1p-20 + 0x1p-23 * d);
  const double part = product_of(x, other) / product_of(x, x);
  const double scale = (dominated ? 0.05 : 0.98) * unit / std::sqrt(product_of(x, x));
  const double off = 0.5 - between(0.001, 0.02);
  Values result(x.size());
  for (size_t i = 1; i < x.size(); ++i) {
    const double direction = errors == along ? x[i] : other[i] - part * x[i];
    result[i] = std::round(x[i] * scale) + (direction > 0 ? off : -off);
  }
  result[0] = std::sqrt(std::max(0.0, norm * norm - product_of(result, result)));
  return result;
}

// The same for AmxScreen: the nearest bfloat16 numbers, powers of two, are almost 2^-8 below the
// elements, and what is left after that is as far from the next ones; with other signs `across`.
// `dominated`: all elements are equal but for signs.
Values between_bfloat16(const Values& x, Errors errors, bool dominated) {
  Values result(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double power = dominated ? 1 : std::exp2(std::round(std::log2(std::abs(x[i]))));
    const double low = 0x1p-8 * (1 - 0x1p-8 * between(0.505, 0.55)), sign = x[i] > 0 ? 1 : -1;
    result[i] = sign * power * (errors == along ? 1 + low : 1 - low / 2);
  }
  return result;
}

Values unfavorable(const Values& x, const Values& other, Errors errors, bool dominated) {
  if constexpr (std::is_same_v<Screen, FixedPointScreen>) {
    return halfway<Screen>(x, other, errors, dominated);
  } else {
    return between_bfloat16(x, errors, dominated);
  }
}

// The rows of one panel or of one tile, rounded.
struct Rows {
  int64_t d, stride, word_stride;
  std::vector<float> rows, scales;      // [count, stride], [count]
  std::vector<uint32_t> words;          // [count, word_stride]
  std::vector<Screen::Extent> extents;  // [count]

  Rows(int64_t d, int64_t count)
      : d(d),
        stride(padded_stride<float>(d)),
        word_stride(padded_stride<uint32_t>(Screen::words(d))),
        rows(count * stride),
        scales(count),
        words(count * word_stride),
        extents(count) {}

  void set(int64_t i, const Values& x, double scale, bool is_cosine) {
    std::vector<Element> elements(d);
    for (int64_t t = 0; t < d; ++t) narrow(float(x[t] * scale), elements[t]);
    float* row = &rows[i * stride];
    Normalizer normalizer;
    if (is_cosine) {
      normalizer = normalizer_of(elements.data(), d);
      normalizer.normalize(elements.data(), d, row);
    } else {
      for (int64_t t = 0; t < d; ++t) row[t] = widen(elements[t]);
    }
    const auto rounded =
        Screen::round(elements.data(), row, d, is_cosine ? Metric::cosine : Metric::dot,
                      normalizer.inverse_norm(), &words[i * word_stride]);
    scales[i] = rounded.scale;
    extents[i] = rounded.extent;
  }
};

// The largest error as a share of its bound.
double compare(const Rows& queries, const Rows& keys) {
  const int64_t d = keys.d, words = Screen::words(d), panel = kTileColumns<float>;
  std::vector<uint32_t> packed(words * panel);
  for (int64_t i = 0; i < panel; i += kLanes<float>) {
    interleave(&keys.words[i * keys.word_stride], keys.word_stride, words, &packed[i]);
  }
  float screened[Screen::kTileRows * kTileColumns<float>];
  {
    const Screen::Session session(d);
    Screen::multiply(queries.words.data(), queries.word_stride, queries.scales.data(),
                     Screen::kTileRows, packed.data(), words, keys.scales.data(), panel, screened,
                     panel);
  }
  std::vector<float> lanes(d * kLanes<float>);
  to_lanes(queries.rows.data(), queries.stride, d, lanes.data());
  double worst = 0;
  for (int64_t r = 0; r < Screen::kTileRows; ++r) {
    for (int64_t j = 0; j < panel; ++j) {
      int32_t numbers[kLanes<float>];
      const float* rows[kLanes<float>];
      std::fill_n(numbers, kLanes<float>, int32_t(r));
      std::fill_n(rows, kLanes<float>, &keys.rows[j * keys.stride]);
      const double exact = products(lanes.data(), numbers, rows, d)[0];
      const auto row =
          Screen::strip_row(screened + r * panel, keys.scales.data(), queries.scales[r]);
      const double found = row[j];
      const ScreenError error = Screen::error(queries.extents[r], keys.extents[j], d);
      worst = std::max(worst, std::abs(found - exact) / error.from(float(found)));
    }
  }
  return worst;
}

}  // namespace
}  // namespace convnn::screened

// The largest error of some rows of d elements, as a share of its bound. The directions of keys and
// queries differ by about `distance`.
extern "C" double worst_share(int64_t d, double distance, int32_t kind, bool dominated,
                              bool is_cosine, double query_scale, double key_scale) {
  using namespace convnn::screened;
  const Errors errors = Errors(kind);
  Rows queries(d, kLanes<float>), keys(d, kTileColumns<float>);
  Values query(d);
  for (double& x : query) x = normal();
  const double norm = std::sqrt(product_of(query, query));
  for (double& x : query) x /= norm;
  const Values direction = near(query, distance);
  for (int64_t i = 0; i < Screen::kTileRows; ++i) {
    const Values x =
        errors == any ? near(query, distance) : unfavorable(query, direction, errors, dominated);
    queries.set(i, x, query_scale, is_cosine);
  }
  for (int64_t i = 0; i < kTileColumns<float>; ++i) {
    const Values x = near(direction, i % 2 ? distance : 0);
    keys.set(i, errors == any ? x : unfavorable(x, query, errors, dominated),
             key_scale * (i % 3 ? 1 : -1), is_cosine);
  }
  return compare(queries, keys);
}
