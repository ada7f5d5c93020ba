// SPDX-License-Identifier: MIT
// Times selection among the rows of a matrix: packing all of them as keys, and some blocks of rows
// as queries, from which follows the time of all blocks. A few hundred rows show what preparing
// costs, some thousand what a sweep costs; per similarity, both count alike. The least of several
// rounds, in which the sets take turns, is free of most interruptions.
#include "timing.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "parallel.h"

namespace convnn::cpu {
namespace {

constexpr int64_t kRows[] = {512, 2048};
constexpr int kSizes = 2;
constexpr int64_t kDimensions = 64, kNeighbors = 9, kTimedBlocks = 3;
constexpr int kMostRounds = 4, kFewestRounds = 3;
constexpr double kBudget = 0.02;  // seconds after which no other round begins

double seconds() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Pseudo-random numbers between -1 and 1 [rows, kDimensions].
Workspace features(DType dtype, int64_t rows) {
  const bool is_short = dtype == DType::bfloat16;
  Workspace memory(size_t(rows * kDimensions) * (is_short ? 2 : 4));
  uint32_t state = 1;  // of a xorshift generator
  for (int64_t i = 0; i < rows * kDimensions; ++i) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    const float x = float(int32_t(state)) * 0x1p-31f;
    if (is_short) {
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      memory.as<uint16_t>()[i] = uint16_t(bits >> 16);
    } else {
      memory.as<float>()[i] = x;
    }
  }
  return memory;
}

// The least times of one set in seconds, for each size: to pack, and of a block of query rows.
struct Least {
  double pack[kSizes], block[kSizes];

  Least() {
    std::fill_n(pack, kSizes, 1e9);
    std::fill_n(block, kSizes, 1e9);
  }
};

// One dtype: its features, and memory for all sizes and sets.
class Trial {
 public:
  Trial(DType dtype, const std::vector<const Kernels*>& sets)
      : dtype_(dtype),
        features_(features(dtype, kRows[kSizes - 1])),
        similarities_(size_t(kRows[kSizes - 1] * kNeighbors) * sizeof(float)),
        indices_(size_t(kRows[kSizes - 1] * kNeighbors) * sizeof(int64_t)) {
    size_t packed = 0, scratch = 0;
    for (const Kernels* set : sets) {
      for (int64_t rows : kRows) {
        const SelectKernel& kernel = set->select[int(dtype)];
        packed = std::max(packed, kernel.packed_bytes(params(rows), rows));
        scratch = std::max(scratch, kernel.scratch_bytes(params(rows)));
      }
    }
    packed_ = Workspace(packed);
    scratch_ = Workspace(scratch);
  }

  // Other query rows in every round: the branch predictor would remember them. Nor is the first
  // block timed, which follows another set's kernels.
  void run(const SelectKernel& kernel, int round, Least& least) const {
    for (int size = 0; size < kSizes; ++size) {
      const int64_t rows = kRows[size];
      const SelectParams p = params(rows);
      SelectWork work{};
      work.max_columns = rows;
      work.packed = packed_.get();
      const double start = seconds();
      kernel.pack(p, work, 0, ceil_div(rows, kernel.columns_per_panel), scratch_.get());
      const double packed = seconds();
      const int64_t blocks = ceil_div(rows, kernel.rows_per_task);
      const int64_t timed = std::min(kTimedBlocks, blocks), others = blocks - timed;
      const int64_t first = others > 0 ? 1 + round * (1 + timed) % others : 0;
      const int64_t before = std::max<int64_t>(first - 1, 0);
      kernel.rows(p, work, before, before + 1, scratch_.get());
      const double ready = seconds();
      kernel.rows(p, work, first, first + timed, scratch_.get());
      least.pack[size] = std::min(least.pack[size], packed - start);
      least.block[size] = std::min(least.block[size], (seconds() - ready) / double(timed));
    }
  }

  // Picoseconds per similarity, summed over the sizes.
  static int64_t result(const SelectKernel& kernel, const Least& least) {
    double sum = 0;
    for (int size = 0; size < kSizes; ++size) {
      const double blocks = double(kRows[size]) / double(kernel.rows_per_task);
      const double all = least.pack[size] + least.block[size] * blocks;
      sum += 1e12 * all / double(kRows[size] * kRows[size]);
    }
    return std::max<int64_t>(1, int64_t(sum));
  }

 private:
  SelectParams params(int64_t rows) const {
    SelectParams p{};
    p.batch = 1, p.n = p.m = rows, p.d = kDimensions, p.k = kNeighbors;
    p.dtype = dtype_, p.metric = Metric::cosine, p.order = Order::similarity;
    p.query = p.key = dense_rows(features_.get(), rows, kDimensions);
    p.similarities = similarities_.get();
    p.indices = indices_.as<int64_t>();
    return p;
  }

  DType dtype_;
  Workspace features_, similarities_, indices_, packed_, scratch_;
};

}  // namespace

Measurement measure(const std::vector<const Kernels*>& sets) {
  const double start = seconds();
  const size_t count = sets.size();
  std::vector<Trial> trials;
  for (DType dtype : kTimedDTypes) trials.emplace_back(dtype, sets);
  std::vector<Least> least(kTimed * count);
  const auto kernel = [&](size_t at) -> const SelectKernel& {
    return sets[at % count]->select[int(kTimedDTypes[at / count])];
  };
  int rounds = 0;
  for (; rounds < kMostRounds && (rounds == 0 || seconds() - start < kBudget); ++rounds) {
    for (size_t turn = 0; turn < least.size(); ++turn) {
      const size_t at = rounds % 2 ? least.size() - 1 - turn : turn;
      trials[at / count].run(kernel(at), rounds, least[at]);
    }
  }
  Measurement measured;
  for (const Kernels* set : sets) measured.times.sets.push_back(set->instruction_set);
  for (size_t at = 0; at < least.size(); ++at) {
    measured.times.picoseconds[at / count].push_back(Trial::result(kernel(at), least[at]));
  }
  measured.milliseconds = 1e3 * (seconds() - start);
  measured.is_steady = rounds >= kFewestRounds;
  return measured;
}

}  // namespace convnn::cpu
