// SPDX-License-Identifier: MIT
// What the key ranges of a selection say about its cost: which keys are needed at all, and how much
// there is to do for each block of queries.
#pragma once

#include <cstdint>
#include <vector>

#include "../params.h"
#include "operators.h"

namespace convnn::cpu {

class KeyRanges {
 public:
  // The rows begin ... end - 1 of key.
  struct Rows {
    int64_t begin, end;
  };

  KeyRanges(const SelectParams& p, int64_t rows_per_block, ParallelFor parallel_for);

  // False if every query may see all keys. Call nothing else then.
  bool exist() const { return !blocks_.empty(); }

  // All rows that some query of a batch element may see, and what is between them.
  Rows seen(int64_t batch) const { return seen_[size_t(batch % int64_t(seen_.size()))]; }
  // The largest number of rows that `seen` has for any batch element.
  int64_t most_seen() const;
  // How many rows a query may see on average.
  int64_t average() const;
  // How many pairs of a key and a query of this block there are.
  int64_t pairs(int64_t batch, int64_t block) const {
    const int64_t task = batch * blocks_per_batch_ + block;
    return blocks_[size_t(task % int64_t(blocks_.size()))].pairs;
  }

 private:
  struct Block {
    Rows seen;
    int64_t pairs;
  };

  int64_t queries_, blocks_per_batch_;
  std::vector<Block> blocks_;  // of each batch element, or of one if all have the same ranges
  std::vector<Rows> seen_;     // of each of those batch elements
};

}  // namespace convnn::cpu
