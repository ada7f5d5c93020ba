// SPDX-License-Identifier: MIT
// Times selection from float32 among the rows of a matrix: packing all of them as keys, and some
// blocks of rows as queries, from which follows the time of all blocks. A few hundred rows show
// what preparing costs, some thousand what a sweep costs; per similarity, both count alike. The CPU
// time of a thread does not count what runs in its place; the least of several rounds, in which the
// sets take turns, is free of most of what shares its caches and its clock rate.
#include "timing.h"

#include <time.h>

#include <algorithm>

#include "parallel.h"

namespace convnn::cpu {
namespace {

constexpr int64_t kRows[] = {512, 2048};
constexpr int kSizes = 2, kRounds = 4;
constexpr int64_t kDimensions = 64, kNeighbors = 9, kTimedBlocks = 3;

// CPU time of the calling thread.
double seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

constexpr char kFor[] = "the choice of an instruction set";

// Pseudo-random numbers between -1 and 1 [rows, kDimensions] float32.
Workspace features(int64_t rows) {
  Workspace memory(size_t(rows * kDimensions) * sizeof(float), kFor);
  uint32_t state = 1;  // of a xorshift generator
  for (int64_t i = 0; i < rows * kDimensions; ++i) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    memory.as<float>()[i] = float(int32_t(state)) * 0x1p-31f;
  }
  return memory;
}

const SelectKernel& select(const Kernels& set) { return set.select[int(DType::float32)]; }

// The least times of one set in seconds, for each size: to pack, and of a block of query rows.
struct Least {
  double pack[kSizes], block[kSizes];

  Least() {
    std::fill_n(pack, kSizes, 1e9);
    std::fill_n(block, kSizes, 1e9);
  }
};

// Features and memory for all sizes and sets.
class Trial {
 public:
  explicit Trial(const std::vector<const Kernels*>& sets)
      : features_(features(kRows[kSizes - 1])),
        similarities_(size_t(kRows[kSizes - 1] * kNeighbors) * sizeof(float), kFor),
        indices_(size_t(kRows[kSizes - 1] * kNeighbors) * sizeof(int64_t), kFor) {
    size_t packed = 0, scratch = 0;
    for (const Kernels* set : sets) {
      for (int64_t rows : kRows) {
        const bool screened = select(*set).screen_pays(params(rows), rows);
        packed = std::max(packed, select(*set).packed_bytes(params(rows), rows, screened));
        scratch = std::max(scratch, select(*set).scratch_bytes(params(rows)));
      }
    }
    packed_ = Workspace(packed, kFor);
    scratch_ = Workspace(scratch, kFor);
  }

  // Other query rows in every round: the branch predictor would remember them. Nor is the first
  // block timed, which follows another set's kernels.
  void run(const SelectKernel& kernel, int round, Least& least) const {
    for (int size = 0; size < kSizes; ++size) {
      const int64_t rows = kRows[size];
      const SelectParams p = params(rows);
      SelectWork work{};
      work.max_columns = rows;
      work.screened = kernel.screen_pays(p, rows);
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

 private:
  SelectParams params(int64_t rows) const {
    SelectParams p{};
    p.batch = 1, p.n = p.m = rows, p.d = kDimensions, p.k = kNeighbors;
    p.dtype = DType::float32, p.metric = Metric::cosine, p.order = Order::similarity;
    p.query = p.key = dense_rows(features_.get(), rows, kDimensions);
    p.similarities = similarities_.get();
    p.indices = indices_.as<int64_t>();
    return p;
  }

  Workspace features_, similarities_, indices_, packed_, scratch_;
};

// Picoseconds per similarity, summed over the sizes.
int64_t result(const SelectKernel& kernel, const Least& least) {
  double sum = 0;
  for (int size = 0; size < kSizes; ++size) {
    const double blocks = double(kRows[size]) / double(kernel.rows_per_task);
    const double all = least.pack[size] + least.block[size] * blocks;
    sum += 1e12 * all / double(kRows[size] * kRows[size]);
  }
  return std::max<int64_t>(1, int64_t(sum));
}

}  // namespace

Measurement measure(const std::vector<const Kernels*>& sets) {
  const double start = seconds();
  const Trial trial(sets);
  std::vector<Least> least(sets.size());
  for (int round = 0; round < kRounds; ++round) {
    for (size_t turn = 0; turn < sets.size(); ++turn) {
      const size_t set = round % 2 ? sets.size() - 1 - turn : turn;
      trial.run(select(*sets[set]), round, least[set]);
    }
  }
  Measurement measured;
  for (size_t set = 0; set < sets.size(); ++set) {
    measured.picoseconds.push_back(result(select(*sets[set]), least[set]));
  }
  measured.microseconds = int64_t(1e6 * (seconds() - start));
  return measured;
}

}  // namespace convnn::cpu
