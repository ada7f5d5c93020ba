// SPDX-License-Identifier: MIT
// The gradients of select on the CPU, from g = grad_similarities at the selected neighbors:
//
//   dot        dq_i = sum_j g_ij k_j                  dk_m = sum g_ij q_i
//   euclidean  dq_i = sum_j -2 g_ij (q_i - k_j)       dk_m = sum 2 g_ij (q_i - k_m)
//   cosine     dq_i = (I - q^ q^T) t / ||q_i||,       dk_m = (I - k^ k^T) u / ||k_m||,
//              t = sum_j g_ij k^_j                    u = sum g_ij q^_i
//
// where j runs over the neighbors of i, and the sums of dk over the pairs (i, j) with I_ij = m.
// A task computes query rows or key rows. The pairs of a key row come from the inverse neighbor
// list in a fixed order, so nothing is scattered. Sums are in float64, since a key may be in many
// pairs. A row of norm <= epsilon has gradient exactly 0.
#pragma once

#include "kernels.h"
#include "modulate.h"
#include "normalize.h"

namespace convnn::CONVNN_ISA {

template <class T>
class SelectBackward {
  using A = accumulate_t<T>;

 public:
  static size_t scratch_bytes(const SelectBackwardParams& p) {
    return size_t(p.d) * sizeof(double);
  }

  static void query_norms(const SelectBackwardParams& p, double* inverse_norms, int64_t begin,
                          int64_t end) {
    norms(p.query, p.n, p.d, inverse_norms, begin, end);
  }
  static void key_norms(const SelectBackwardParams& p, double* inverse_norms, int64_t begin,
                        int64_t end) {
    norms(p.key, p.m, p.d, inverse_norms, begin, end);
  }

  static void query_rows(const SelectBackwardParams& p, const double* query_norms,
                         const double* key_norms, int64_t begin, int64_t end, void* scratch) {
    const A* grads = static_cast<const A*>(p.grad_similarities);
    double* sum = static_cast<double*>(scratch);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.n;
      const T* q = p.query.at<T>(b, row % p.n);
      bool in_pairs = false;
      sum_pairs(p, q, sum, [&](const auto& add) {
        for (int64_t entry = row * p.k; entry < (row + 1) * p.k; ++entry) {
          if (missing(p, entry)) continue;
          in_pairs = true;
          const int64_t key_row = p.indices[entry];
          add(grads[entry], p.key.at<T>(b, key_row), key_norms, b * p.m + key_row);
        }
      });
      finish(p.metric, in_pairs, sum, q, query_norms, row, p.d,
             static_cast<T*>(p.grad_query) + row * p.d);
    }
  }

  static void key_rows(const SelectBackwardParams& p, const InverseList& inverse,
                       const double* query_norms, const double* key_norms, int64_t begin,
                       int64_t end, void* scratch) {
    double* sum = static_cast<double*>(scratch);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.m;
      const int64_t* offsets = inverse.offsets + b * (p.m + 1) + row % p.m;
      const int64_t* pairs = inverse.pairs + b * p.n * p.k;
      const A* grads = static_cast<const A*>(p.grad_similarities) + b * p.n * p.k;
      const T* k = p.key.at<T>(b, row % p.m);
      sum_pairs(p, k, sum, [&](const auto& add) {
        for (int64_t at = offsets[0]; at < offsets[1]; ++at) {
          const int64_t slot = inverse.slot(pairs[at]), i = inverse.row(pairs[at]);
          add(grads[i * p.k + slot], p.query.at<T>(b, i), query_norms, b * p.n + i);
        }
      });
      finish(p.metric, offsets[0] < offsets[1], sum, k, key_norms, row, p.d,
             static_cast<T*>(p.grad_key) + row * p.d);
    }
  }

 private:
  // The inverse norms of rows of x [batch, rows, d].
  static void norms(const StridedRows& x, int64_t rows, int64_t d, double* inverse_norms,
                    int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      inverse_norms[row] = normalizer_of(x.at<T>(row / rows, row % rows), d).inverse_norm();
    }
  }

  static bool missing(const SelectBackwardParams& p, int64_t entry) {
    return is_missing(static_cast<const A*>(p.similarities)[entry]);
  }

  // sum [d] of what the pairs of a row x contribute to its gradient, before finish(). For each of
  // them, each_pair(add) calls add(grad, other row, norms of the other rows, its number).
  template <class EachPair>
  static void sum_pairs(const SelectBackwardParams& p, const T* x, double* sum,
                        const EachPair& each_pair) {
    each_block<kSumVectors>(p.d, [&](auto block, int64_t first) {
      constexpr int kVectors = decltype(block)::kVectors;
      Vector<double> total[kVectors] = {};
      if (p.metric == Metric::euclidean) {
        each_pair([&](double grad, const T* other, const double*, int64_t) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            total[v] += 2 * grad * (block.load(other + first, v) - block.load(x + first, v));
          }
        });
      } else {
        const bool is_cosine = p.metric == Metric::cosine;
        each_pair([&](double grad, const T* other, const double* norms, int64_t row) {
          add_scaled(block, is_cosine ? grad * norms[row] : grad, other + first, total);
        });
      }
      store_sum(block, total, sum + first);
    });
  }

  // The gradient of row x from its sum. Cosine: projects the sum onto the tangent space of the row
  // and divides by its norm. A row in no pair has gradient 0, whatever its elements are.
  static void finish(Metric metric, bool in_pairs, const double* sum, const T* x,
                     const double* norms, int64_t row, int64_t d, T* grad) {
    const double inverse = metric == Metric::cosine ? norms[row] : 1;
    const bool is_projected = metric == Metric::cosine && in_pairs && inverse != 0;
    // The row is normalized first: the product of a large row would overflow.
    const auto unit = [&](const auto& block, int64_t first, int v = 0) {
      return block.load(x + first, v) * inverse;
    };
    double along = 0;
    if (is_projected) {
      along =
          sum_of(d, [&](auto block, int64_t i) { return block.load(sum + i) * unit(block, i); });
    }
    each_block<4>(d, [&](auto block, int64_t first) {
#pragma GCC unroll 4
      for (int v = 0; v < block.kVectors; ++v) {
        Vector<double> total = block.load(sum + first, v);
        if (is_projected) total = (total - unit(block, first, v) * along) * inverse;
        block.store(grad + first, inverse == 0 ? Vector<double>{} : total, v);
      }
    });
  }
};

template <class T>
SelectBackwardKernel select_backward_kernel() {
  using K = SelectBackward<T>;
  return {K::scratch_bytes, K::query_norms, K::key_norms, K::query_rows, K::key_rows};
}

}  // namespace convnn::CONVNN_ISA
