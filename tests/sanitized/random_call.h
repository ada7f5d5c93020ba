// SPDX-License-Identifier: MIT
// Random calls of the operators on the CPU: each is made from a seed.
#pragma once

#include <string>
#include <vector>

#include "../../csrc/cpu/operators.h"
#include "draw.h"

namespace sanitized {

// A tensor of floating-point elements.
struct Floats {
  Array<char> memory;
  convnn::DType dtype = convnn::DType::float32;
  int64_t count = 0;

  void* data() const { return memory.data(); }
};

Floats new_floats(convnn::DType dtype, int64_t count);

// The sizes and choices of a call.
struct Shape {
  int64_t batch, n, m, d, c, o, k;
  convnn::DType dtype, value_dtype;
  convnn::Metric metric;
  convnn::Rho rho;
  convnn::Order order;
  convnn::Convolution convolution;
};

class RandomCall {
 public:
  explicit RandomCall(uint64_t seed);

  // Sizes and choices in words.
  std::string description() const;

  // Selects, aggregates and computes gradients. Returns a digest of each result, in which all NaN
  // are alike.
  struct Digest {
    const char* name;
    uint64_t hash;
  };
  std::vector<Digest> run(convnn::cpu::ParallelFor parallel_for) const;

 private:
  void draw_restrictions(Draw& draw);
  void draw_gradients(Draw& draw);
  convnn::StridedRows rows(Draw& draw, Floats& memory, std::vector<int64_t>& offsets,
                           convnn::DType dtype, int64_t count, int64_t columns);

  Shape shape_;
  convnn::SelectParams select_ = {};
  convnn::AggregateParams aggregate_ = {};
  Floats query_, key_, value_, weight_, bias_, grad_output_, grad_similarities_;
  std::vector<int64_t> query_offsets_, key_offsets_, value_offsets_;
  Array<int64_t> candidates_, self_indices_, key_range_;
  Array<uint8_t> key_mask_;
  // Which gradients are needed, and whether each operator is called on its own.
  bool needs_[5] = {};
  bool apart_ = false;
};

}  // namespace sanitized
