// SPDX-License-Identifier: MIT
#include "launch.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(CONVNN_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace convnn::cpu {
namespace {

// Packed keys held at a time, but at least those of one batch element.
constexpr size_t kPackedBytes = size_t(16) << 20;
// Below this many multiply-adds a range is not worth a thread.
constexpr int64_t kMinimumWork = 1 << 15;

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  const Kernels& (*kernels)();
};

#if defined(CONVNN_WITH_AVX2)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#if defined(CONVNN_WITH_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
#endif
#if defined(CONVNN_WITH_AVX512VNNI)
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif
#if defined(CONVNN_WITH_AMX)
// Whether the processor has AMX for bfloat16, Linux lets this process use it, and it multiplies.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!has_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & kBfloat16) || !(d & kTiles)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 && amx::tiles_multiply();
}
#endif

// Best first.
constexpr InstructionSet kInstructionSets[] = {
#if defined(CONVNN_WITH_AMX)
    {"amx", has_amx, amx::kernels},
#endif
#if defined(CONVNN_WITH_AVX512VNNI)
    {"avx512vnni", has_vnni, avx512vnni::kernels},
#endif
#if defined(CONVNN_WITH_AVX512)
    {"avx512", has_avx512, avx512::kernels},
#endif
#if defined(CONVNN_WITH_AVX2)
    {"avx2", has_avx2, avx2::kernels},
#endif
    {"portable", [] { return true; }, portable::kernels},
};

// Asks of no other set than the one that is wanted whether it runs here: asking executes tiles.
const Kernels& choose_kernels() {
  const char* wanted = std::getenv("CONVNN_CPU_ISA");
  const bool any = !wanted || !*wanted;
  for (const InstructionSet& set : kInstructionSets) {
    if ((any || std::strcmp(wanted, set.name) == 0) && set.runs_here()) return set.kernels();
  }
  std::string names;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.runs_here()) names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::runtime_error("CONVNN_CPU_ISA must be one of the instruction sets that run here (" +
                           names + "), got " + wanted);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// Workspace on a boundary of 64 bytes. malloc with room to spare takes a fraction of the time of an
// aligned allocation, which a small call would feel.
class Memory {
 public:
  explicit Memory(void* whole) : whole_(whole) {}
  void* get() const {
    return reinterpret_cast<void*>((uintptr_t(whole_.get()) + 63) & ~uintptr_t(63));
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> whole_;
};

// Null for no bytes.
Memory allocate(size_t bytes) {
  void* memory = bytes ? std::malloc(bytes + 63) : nullptr;
  if (bytes && !memory) {
    throw std::runtime_error("convnn: cannot allocate " + std::to_string(bytes) +
                             " bytes of workspace");
  }
  return Memory(memory);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t grain_of(double work_per_task) {
  return std::max<int64_t>(1, int64_t(kMinimumWork / std::max(1.0, work_per_task)));
}

// Runs pass(begin, end, scratch) over the tasks, with a scratch for each range.
template <class Pass>
void run(ParallelFor parallel_for, int64_t tasks, double work_per_task, size_t scratch_bytes,
         const Pass& pass) {
  const auto run_range = [&](int64_t begin, int64_t end) {
    const Memory scratch = allocate(scratch_bytes);
    pass(begin, end, scratch.get());
  };
  const int64_t grain = grain_of(work_per_task);
  if (tasks <= grain) {
    if (tasks > 0) run_range(0, tasks);
    return;
  }
  // PyTorch's stable interface loses the message of what is thrown inside its parallel region.
  std::mutex mutex;
  std::exception_ptr failure;
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    try {
      run_range(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// The rows of key that may be neighbors in one batch element, ascending. Returns how many.
int64_t list_columns(const SelectParams& p, const std::vector<int64_t>& sorted_candidates,
                     int64_t batch, int64_t* columns) {
  const bool* mask = p.key_mask ? p.key_mask + batch * p.m : nullptr;
  int64_t count = 0;
  const int64_t choices = p.candidates ? p.r : p.m;
  for (int64_t i = 0; i < choices; ++i) {
    const int64_t row = p.candidates ? sorted_candidates[size_t(i)] : i;
    if (!mask || mask[row]) columns[count++] = row;
  }
  return count;
}

// InverseNeighbors with the memory it points into.
struct Inverse {
  Memory offsets, places;
  InverseNeighbors view() const {
    return {static_cast<const int64_t*>(offsets.get()), static_cast<const int64_t*>(places.get())};
  }
};

// missing(place) tells whether a place of indices [batch, n, k] holds no neighbor.
template <class Missing>
Inverse invert(int64_t batch, int64_t n, int64_t m, int64_t k, const int64_t* indices,
               const Missing& missing, ParallelFor parallel_for) {
  Inverse inverse = {allocate(size_t(batch * (m + 1)) * sizeof(int64_t)),
                     allocate(size_t(batch * n * k) * sizeof(int64_t))};
  int64_t* all_offsets = static_cast<int64_t*>(inverse.offsets.get());
  int64_t* all_places = static_cast<int64_t*>(inverse.places.get());
  run(parallel_for, batch, double(n) * double(k), 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * n * k;
      int64_t* offsets = all_offsets + b * (m + 1);
      int64_t* places = all_places + first;
      std::fill(offsets, offsets + m + 1, 0);
      for (int64_t place = first; place < first + n * k; ++place) {
        if (!missing(place)) ++offsets[indices[place] + 1];
      }
      for (int64_t row = 0; row < m; ++row) offsets[row + 1] += offsets[row];
      // Filling moves every offset to the end of its list, which is where the next one begins.
      for (int64_t slot = 0; slot < k; ++slot) {
        for (int64_t i = 0; i < n; ++i) {
          const int64_t place = first + i * k + slot;
          if (!missing(place)) places[offsets[indices[place]]++] = slot * n + i;
        }
      }
      std::copy_backward(offsets, offsets + m, offsets + m + 1);
      offsets[0] = 0;
    }
  });
  return inverse;
}

bool is_missing(const void* similarities, DType dtype, int64_t place) {
  const double s = dtype == DType::float64 ? static_cast<const double*>(similarities)[place]
                                           : static_cast<const float*>(similarities)[place];
  return std::isinf(s) && s < 0;
}

}  // namespace

const char* instruction_set() { return kernels().instruction_set; }

void select(const SelectParams& p, ParallelFor parallel_for) {
  if (p.batch == 0 || p.n == 0) return;
  const SelectKernel& kernel = kernels().select[int(p.dtype)];
  std::vector<int64_t> candidates(p.candidates, p.candidates + (p.candidates ? p.r : 0));
  std::sort(candidates.begin(), candidates.end());

  const int64_t columns = p.candidates ? p.r : p.m;
  const size_t packed_bytes = kernel.packed_bytes(p, columns);
  const int64_t batches =
      std::clamp<int64_t>(int64_t(kPackedBytes / std::max<size_t>(packed_bytes, 1)), 1, p.batch);
  const Memory packed = allocate(size_t(batches) * packed_bytes);
  const bool listed = p.candidates || p.key_mask;
  std::vector<int64_t> rows(listed ? size_t(batches * columns) : 0);
  std::vector<int64_t> counts(listed ? size_t(batches) : 0);
  const size_t scratch_bytes = kernel.scratch_bytes(p);

  for (int64_t first = 0; first < p.batch; first += batches) {
    const int64_t count = std::min(batches, p.batch - first);
    if (listed) {
      run(parallel_for, count, double(columns), 0, [&](int64_t begin, int64_t end, void*) {
        for (int64_t b = begin; b < end; ++b) {
          counts[size_t(b)] = list_columns(p, candidates, first + b, rows.data() + b * columns);
        }
      });
    }
    const SelectWork work = {first, columns, listed ? rows.data() : nullptr,
                             listed ? counts.data() : nullptr, packed.get()};
    const double row_work = double(p.d) * double(columns);
    run(parallel_for, count * ceil_div(columns, kernel.columns_per_panel),
        double(p.d * kernel.columns_per_panel), scratch_bytes,
        [&](int64_t begin, int64_t end, void* scratch) {
          kernel.pack(p, work, begin, end, scratch);
        });
    run(parallel_for, count * ceil_div(p.n, kernel.rows_per_task),
        row_work * double(kernel.rows_per_task), scratch_bytes,
        [&](int64_t begin, int64_t end, void* scratch) {
          kernel.rows(p, work, begin, end, scratch);
        });
  }
}

void select_backward(const SelectBackwardParams& p, ParallelFor parallel_for) {
  if (p.batch == 0) return;
  const SelectBackwardKernel& kernel = kernels().select_backward[int(p.dtype)];
  const size_t scratch_bytes = kernel.scratch_bytes(p);
  const bool cosine = p.metric == Metric::cosine;
  const Memory query_norms = allocate(cosine ? size_t(p.batch * p.n) * sizeof(double) : 0);
  const Memory key_norms = allocate(cosine ? size_t(p.batch * p.m) * sizeof(double) : 0);
  double* of_queries = static_cast<double*>(query_norms.get());
  double* of_keys = static_cast<double*>(key_norms.get());
  if (cosine) {
    run(parallel_for, p.batch * p.n, double(p.d), 0,
        [&](int64_t begin, int64_t end, void*) { kernel.query_norms(p, of_queries, begin, end); });
    run(parallel_for, p.batch * p.m, double(p.d), 0,
        [&](int64_t begin, int64_t end, void*) { kernel.key_norms(p, of_keys, begin, end); });
  }
  const double pair_work = double(p.d) * double(p.k);
  if (p.grad_query) {
    run(parallel_for, p.batch * p.n, pair_work, scratch_bytes,
        [&](int64_t begin, int64_t end, void* scratch) {
          kernel.query_rows(p, of_queries, of_keys, begin, end, scratch);
        });
  }
  if (p.grad_key) {
    const DType dtype = p.dtype == DType::float64 ? DType::float64 : DType::float32;
    const Inverse inverse = invert(
        p.batch, p.n, p.m, p.k, p.indices,
        [&](int64_t place) { return is_missing(p.similarities, dtype, place); }, parallel_for);
    const InverseNeighbors view = inverse.view();
    run(parallel_for, p.batch * p.m, pair_work, scratch_bytes,
        [&](int64_t begin, int64_t end, void* scratch) {
          kernel.key_rows(p, view, of_queries, of_keys, begin, end, scratch);
        });
  }
}

void aggregate(const AggregateParams& p, ParallelFor parallel_for) {
  if (p.batch == 0 || p.n == 0) return;
  const AggregateKernel& kernel = kernels().aggregate[int(p.dtype)];
  const Memory weight = allocate(kernel.packed_weight_bytes(p));
  kernel.pack_weight(p, weight.get());
  const double outputs = p.convolution == Convolution::dense ? double(p.o) : 1.0;
  run(parallel_for, p.batch * ceil_div(p.n, kernel.rows_per_task),
      double(kernel.rows_per_task * p.k * p.c) * outputs, kernel.scratch_bytes(p),
      [&](int64_t begin, int64_t end, void* scratch) {
        kernel.rows(p, weight.get(), begin, end, scratch);
      });
}

void aggregate_backward(const AggregateBackwardParams& p, ParallelFor parallel_for) {
  const AggregateParams& f = p.forward;
  const AggregateBackwardKernel& kernel = kernels().aggregate_backward[int(f.dtype)];
  const size_t scratch_bytes = kernel.scratch_bytes(p);
  const bool dense = f.convolution == Convolution::dense;
  const double block_work = double(kernel.rows_per_task * f.k * f.c);
  const bool needs_grad_rho = p.grad_similarities && f.rho != Rho::ones;
  const bool needs_weight = p.grad_value || needs_grad_rho;
  const Memory weight = allocate(needs_weight ? kernel.packed_weight_bytes(p) : 0);
  if (needs_weight) kernel.pack_weight(p, weight.get());

  const bool dense_pairs = dense && needs_weight;
  const bool needs_rho = p.grad_value || p.grad_weight || dense_pairs;
  const size_t rho_bytes = size_t(f.batch * f.n * f.k) * sizeof(double);
  const Memory rho_memory = allocate(needs_rho ? rho_bytes : 0);
  double* rho = static_cast<double*>(rho_memory.get());
  if (needs_rho || p.grad_similarities) {
    const double row_work = double(kernel.rows_per_task * f.k * (dense ? 1 : f.c));
    run(parallel_for, f.batch * ceil_div(f.n, kernel.rows_per_task), row_work, scratch_bytes,
        [&](int64_t begin, int64_t end, void* scratch) {
          kernel.query_rows(p, weight.get(), rho, begin, end, scratch);
        });
  }
  if (p.grad_value || dense_pairs) {
    const Inverse inverse = invert(
        f.batch, f.n, f.m, f.k, f.indices,
        [&](int64_t place) { return is_missing(f.similarities, f.similarity_dtype, place); },
        parallel_for);
    const InverseNeighbors view = inverse.view();
    if (!dense) {
      run(parallel_for, f.batch * ceil_div(f.m, kernel.rows_per_task), block_work, scratch_bytes,
          [&](int64_t begin, int64_t end, void* scratch) {
            kernel.key_rows(p, view, weight.get(), rho, begin, end, scratch);
          });
    } else {
      const int64_t tasks = kernel.pair_tasks(p);
      const Memory grad_rho_memory = allocate(needs_grad_rho ? rho_bytes : 0);
      double* grad_rho = static_cast<double*>(grad_rho_memory.get());
      const Memory cuts_memory =
          allocate(p.grad_value ? size_t(f.batch * tasks * 2 * f.c) * sizeof(double) : 0);
      double* cuts = static_cast<double*>(cuts_memory.get());
      run(parallel_for, f.batch * tasks, double(f.n * f.k) / double(tasks) * double(f.c * f.o),
          scratch_bytes, [&](int64_t begin, int64_t end, void* scratch) {
            kernel.pairs(p, view, weight.get(), rho, grad_rho, cuts, begin, end, scratch);
          });
      if (p.grad_value) {
        run(parallel_for, f.batch, double(tasks * f.c), 0,
            [&](int64_t begin, int64_t end, void*) { kernel.cut_keys(p, view, cuts, begin, end); });
      }
      if (needs_grad_rho) {
        run(parallel_for, f.batch * f.n, double(f.k), 0, [&](int64_t begin, int64_t end, void*) {
          kernel.similarities(p, rho, grad_rho, begin, end);
        });
      }
    }
  }
  const double rows = double(f.batch * f.n);
  if (p.grad_weight) {
    const int64_t parts = kernel.weight_parts(p), elements = (dense ? f.o : 1) * f.c;
    const Memory parts_memory = allocate(size_t(parts * f.k * elements) * sizeof(double));
    double* sums = static_cast<double*>(parts_memory.get());
    run(parallel_for, kernel.weight_tasks(p),
        rows / double(parts) * (dense ? double(f.o) : 1.0) * 64, scratch_bytes,
        [&](int64_t begin, int64_t end, void* scratch) {
          kernel.weight(p, rho, sums, begin, end, scratch);
        });
    run(parallel_for, elements, double(parts * f.k), 0,
        [&](int64_t begin, int64_t end, void*) { kernel.sum_weight(p, sums, begin, end); });
  }
  if (p.grad_bias) {
    run(parallel_for, kernel.bias_tasks(p), rows * 64, 0,
        [&](int64_t begin, int64_t end, void*) { kernel.bias(p, begin, end); });
  }
}

}  // namespace convnn::cpu
