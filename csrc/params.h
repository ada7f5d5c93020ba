// SPDX-License-Identifier: MIT
// The arguments of the operators as plain data, without PyTorch or CUDA, for every backend written
// in C++. Leading dimensions are flattened into `batch`; the comment after each pointer gives its
// shape. Tensors are dense and row-major, except query, key and value. A pointer is null if the
// argument is absent or the result is not needed.
#pragma once

#include <cstdint>

namespace convnn {

enum class DType : int { float64, float32, float16, bfloat16 };
enum class Metric : int { cosine, dot, euclidean };
enum class Rho : int { softmax, ones, similarity };
enum class Order : int { similarity, index };
enum class Convolution : int { none, depthwise, dense };

// A row whose norm is at most this has cosine 0 with every row, and gradient 0.
constexpr double kCosineEpsilon = 1e-12;

// A tensor [batch, rows, columns] of which only the elements of a row are adjacent. A batch element
// may lie where another does: a bank of keys that is shared by the batch, or by groups of heads.
struct StridedRows {
  const void* data = nullptr;
  int64_t row_stride = 0;    // elements from a row to the next
  int64_t batch_stride = 0;  // elements from a batch element to the next, unless there are offsets
  const int64_t* offsets = nullptr;  // [batch] elements from `data` to a batch element; host memory

  // Elements from `data` to a batch element, on the host.
  int64_t offset(int64_t b) const { return offsets ? offsets[b] : b * batch_stride; }
  // A row of a batch element, on the host.
  template <class T>
  const T* at(int64_t b, int64_t row = 0) const {
    return static_cast<const T*>(data) + offset(b) + row * row_stride;
  }

  bool operator==(const StridedRows& other) const {
    return data == other.data && row_stride == other.row_stride &&
           batch_stride == other.batch_stride && offsets == other.offsets;
  }
};

inline StridedRows dense_rows(const void* data, int64_t rows, int64_t columns) {
  return {data, columns, rows * columns, nullptr};
}

struct SelectParams {
  int64_t batch, n, m, d, k;
  DType dtype;
  Metric metric;
  Order order;
  StridedRows query;            // [batch, n, d] dtype
  StridedRows key;              // [batch, m, d] dtype
  const int64_t* candidates;    // [r] or [batch, r], or null: every row of key
  int64_t r;                    // number of candidates
  int64_t candidates_stride;    // r, or 0: the batch shares them
  const int64_t* self_indices;  // [n] or [batch, n], or null
  int64_t self_stride;          // n, or 0
  bool exclude_self;            // the token itself is never a neighbor; otherwise it is one, unless
                                // it is masked or out of range
  const int64_t* key_range;  // [n, 2] or [batch, n, 2], or null: begin and end of the rows of key
                             // that may be neighbors of a query
  int64_t range_stride;      // 2 n, or 0
  const uint8_t* key_mask;   // [batch, m] or null: a row whose byte is not 0 may be a neighbor
  void* similarities;        // [batch, n, k] float32, float64 for float64
  int64_t* indices;          // [batch, n, k]
};

struct SelectBackwardParams {
  int64_t batch, n, m, d, k;
  DType dtype;
  Metric metric;
  const void* grad_similarities;  // [batch, n, k] float32, float64 for float64
  StridedRows query;              // [batch, n, d] dtype
  StridedRows key;                // [batch, m, d] dtype
  const void* similarities;       // [batch, n, k] float32, float64 for float64
  const int64_t* indices;         // [batch, n, k]
  void* grad_query;               // [batch, n, d] dtype, or null: not needed
  void* grad_key;                 // [batch, m, d] dtype, or null: not needed
};

struct AggregateParams {
  int64_t batch, n, m, c, o, k;  // o: output channels; c without a dense convolution
  DType dtype;                   // of value, weight, bias, output
  DType similarity_dtype;        // float32 or float64
  Convolution convolution;
  Rho rho;
  double scale;
  StridedRows value;         // [batch, m, c] dtype
  const void* similarities;  // [batch, n, k] similarity_dtype; -inf marks a missing neighbor
  const int64_t* indices;    // [batch, n, k]
  const void* weight;        // dense [o, c, k], depthwise [c, 1, k], or null
  const void* bias;          // [o] or null
  void* output;              // [batch, n, o] dtype
};

struct AggregateBackwardParams {
  AggregateParams forward;  // without bias and output
  const void* grad_output;  // [batch, n, o] dtype
  void* grad_value;         // [batch, m, c] dtype, or null: not needed
  void* grad_similarities;  // [batch, n, k] similarity_dtype, or null
  void* grad_weight;        // as weight, or null
  void* grad_bias;          // [o] dtype, or null
};

// The backward pass of select followed by aggregate on the same neighbors. The gradient of the
// similarities is what comes from grad_output plus select.grad_similarities.
struct ForwardBackwardParams {
  AggregateBackwardParams aggregate;  // with a null grad_similarities
  // A null grad_similarities means zero. If rho is ones, grad_query and grad_key must then be null.
  SelectBackwardParams select;
};

}  // namespace convnn
