// SPDX-License-Identifier: MIT
#include "hopper.h"

#include "hopper_dense.h"
#include "hopper_launches.h"
#include "sort.h"

namespace convnn::cuda {
namespace {

constexpr int kMostNeighbors = 64, kFewestColumns = 16, kMostColumns = 128;
// Of the columns of one split, by the format of hits_per_list() and of a slot of the sweep.
constexpr int64_t kMostTiles = 32767;
// Room for the weight in the shared memory of the finish: more would leave too few blocks.
constexpr size_t kMostStaged = 40 << 10;

int64_t columns_of(const SelectParams& p) { return p.candidates ? p.r : p.m; }
int64_t tiles_of(const SelectParams& p) { return ceil_div(columns_of(p), kTileColumns); }
int64_t blocks_of(const SelectParams& p) { return p.batch * ceil_div(p.n, kSweepRows); }
bool is_dense(const StridedRows& rows, int64_t count, int64_t columns) {
  return rows == dense_rows(rows.data, count, columns);
}

// Of the current device, or a small number for tests.
int multiprocessors_of_device() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  check_launch("hopper_forward", cudaGetDevice(&device));
  check_launch("hopper_forward",
               cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
#else
  return 3;
#endif
}

// About how long the sweep and the finish take, in units of a tile of columns and 256 queries.
double cost(int64_t items, int64_t tiles, int splits, int multiprocessors, int step) {
  // Counted from machine code: the threshold and the drain of an item, and of the finish what a
  // further split adds.
  constexpr double kOfItem = 9, kOfSplit = 10;
  const double each = double(ceil_div(tiles, splits));
  const double waves = double(ceil_div(items * splits, multiprocessors));
  return waves * (each + double(ceil_div(int64_t(each), step)) + kOfItem) +
         double(items) / multiprocessors * kOfSplit * splits;
}

// Rows of one launch: as many blocks as the workspace has room for, in whole waves of the device.
int64_t blocks_at_once(const SelectParams& p, const HopperChoices& choices, int64_t most_bytes) {
  const int64_t row_bytes =
      choices.splits * 4 * (hits_per_list(p.k) * int64_t(sizeof(uint64_t)) + 1);
  // The kernels count hits in 32 bits.
  most_bytes = std::min<int64_t>(most_bytes, int64_t(8) << 30);
  const int64_t most = std::max<int64_t>(1, most_bytes / (row_bytes * kSweepRows));
  if (most >= blocks_of(p)) return blocks_of(p);
  const int64_t wave = std::max(1, choices.multiprocessors / choices.splits);
  return most < wave ? most : most / wave * wave;
}

// The keys as the sweep reads them.
template <class T>
struct Keys {
  const T* rows;  // [batch, count, width]
  int64_t count, width;
  const float *inverse, *inverse_sample;  // [batch, m_padded]
  const int64_t* columns;                 // [columns] rows of key, ascending, or null: all of them
};

template <class T>
Keys<T> prepare_keys(const SelectParams& p, bool portable, Context& context) {
  const int64_t tiles = tiles_of(p), m_padded = tiles * kTileColumns, width = p.d <= 64 ? 64 : 128;
  KeysWork<T> w = {};
  w.key = static_cast<const T*>(p.key.data);
  if (p.candidates) {
    const int64_t* rows = keys_in_range(p.candidates, p.r, p.m, context);
    w.rows = gather(rows, sort_positions(rows, p.r, p.m, context), p.r, context);
  }
  w.key_mask = p.key_mask;
  w.m = int(p.m), w.columns = int(columns_of(p)), w.tiles = int(tiles), w.d = int(p.d);
  w.cosine = p.metric == Metric::cosine;
  w.vectors = p.d % 8 == 0 && is_aligned16(w.key);
  // The bulk engine fills up narrower rows.
  const bool as_they_are = w.vectors && !p.candidates && (!portable || p.d == width);
  if (!as_they_are) w.copy = allocate<T>(context, p.batch * m_padded * width);
  float* inverse = allocate<float>(context, p.batch * m_padded);
  const bool all = !p.candidates && !p.key_mask && p.m == m_padded;
  if (!all) w.inverse_sample = allocate<float>(context, p.batch * m_padded);
  w.inverse = inverse;
  launch("hopper_keys_kernel", width == 64 ? hopper_keys_kernel<T, 64> : hopper_keys_kernel<T, 128>,
         p.batch * tiles, 0, context, w);
  const float* inverse_sample = all ? inverse : w.inverse_sample;
  if (as_they_are) return {w.key, p.m, p.d, inverse, inverse_sample, w.rows};
  return {w.copy, m_padded, width, inverse, inverse_sample, w.rows};
}

template <class T>
SweepParams sweep_params(const SelectParams& p, const Keys<T>& keys, const HopperChoices& choices) {
  SweepParams s = {};
  s.query = p.query.data;
  s.inv_k = keys.inverse, s.inv_k_sample = keys.inverse_sample;
  s.n = p.n, s.d = p.d, s.m_padded = tiles_of(p) * kTileColumns;
  s.tiles = int(tiles_of(p)), s.splits = choices.splits, s.step = choices.step;
  s.k = int(p.k), s.list = hits_per_list(p.k);
  s.cosine = p.metric == Metric::cosine;
  s.pairs = p.d % 2 == 0 && reinterpret_cast<uintptr_t>(p.query.data) % 4 == 0;
  return s;
}

// `a` is null unless the finish aggregates.
template <class T>
FinishWork<T> finish_work(const SelectParams& p, const AggregateParams* a, const int64_t* columns,
                          int splits) {
  FinishWork<T> f = {};
  f.blocks_each = int(ceil_div(p.n, kSweepRows));
  f.n = int(p.n), f.k = int(p.k), f.splits = splits;
  f.rows = columns;
  f.by_index = p.order == Order::index;
  f.similarities = static_cast<float*>(p.similarities), f.indices = p.indices;
  if (!a) return f;
  f.value = static_cast<const T*>(a->value.data);
  f.m = uint32_t(a->m), f.c = int(a->c);
  f.rho = a->rho, f.scale = float(a->scale);
  f.weight = static_cast<const T*>(a->weight), f.bias = static_cast<const T*>(a->bias);
  f.output = static_cast<T*>(a->output);
  f.weight_staged = staged_bytes(a->weight ? a->k : 1, a->c) <= kMostStaged;
  f.weight_stride = a->weight ? int(ceil_div(a->c, kGathered)) * kGathered : 0;
  f.vectors = f.weight_staged && a->c % 8 == 0 && is_aligned16(f.value) && is_aligned16(f.output) &&
              (!f.bias || is_aligned16(f.bias));
  return f;
}

template <class T>
void forward_as(const SelectParams& p, const AggregateParams* a, const HopperChoices& choices,
                Context& context) {
  const Keys<T> keys = prepare_keys<T>(p, choices.portable, context);
  SweepParams s = sweep_params(p, keys, choices);
  FinishWork<T> f = finish_work<T>(p, a, keys.columns, choices.splits);
  const int64_t blocks = blocks_of(p), at_once = blocks_at_once(p, choices, context.most_bytes);
  const int64_t rows = choices.splits * at_once * kSweepRows;
  float* inverse_query = allocate<float>(context, p.batch * p.n);
  s.hits = allocate<uint64_t>(context, rows * 4 * hits_per_list(p.k));
  s.counts = allocate<uint8_t>(context, rows * 4);
  s.inv_q = inverse_query;
  f.hits = s.hits, f.counts = s.counts, f.inverse_query = inverse_query;
  for (int64_t first = 0; first < blocks; first += at_once) {
    s.first_block = first;
    f.first_block = int(first);
    s.blocks = f.blocks = int(std::min(at_once, blocks - first));
    if (choices.portable) {
      launch_mma_sweep<T>({keys.rows, keys.count}, s, context);
    } else {
      const TensorMap map = map_rows(keys.rows, p.batch, keys.count, keys.width, kTileColumns);
      launch_sweep<T>(map, s, choices.multiprocessors, context);
    }
    launch_finish<T>(f, choices.multiprocessors, /*dependent=*/!choices.portable, context);
  }
}

// Whether the finish aggregates, too.
bool finish_aggregates(const SelectParams& p, const AggregateParams& a) {
  return a.convolution != Convolution::dense && a.dtype == p.dtype &&
         a.similarity_dtype == DType::float32 && a.similarities == p.similarities &&
         a.indices == p.indices && is_dense(a.value, a.m, a.c) &&
         a.batch * a.m < std::numeric_limits<uint32_t>::max() && a.c < (1 << 24) &&
         std::fabs(a.scale) < 1e30;
}

}  // namespace

const char* hopper_refuses(const SelectParams& p, const AggregateParams*) {
  // What neither the finish nor the dense kernel can aggregate is left to aggregate(), which takes
  // everything.
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
  if (p.dtype != DType::float16 && p.dtype != DType::bfloat16) {
    return "query is neither float16 nor bfloat16";
  }
  if (p.metric == Metric::euclidean) return "the metric is euclidean";
  if (p.d > kMostColumns) return "query has more than 128 columns";
  // The matrix instruction truncates each term of a sum. With fewer terms, that would exceed the
  // rounding errors of a sum in float32.
  if (p.d < kFewestColumns) return "query has fewer than 16 columns";
  if (p.k > kMostNeighbors) return "k is more than 64";
  if (p.self_indices) return "self_indices are given";
  if (p.key_range) return "key_range is given";
  if (p.candidates_stride) return "candidates are those of each batch element";
  if (columns_of(p) == 0) return "there are no keys";
  if (std::max(p.m, columns_of(p)) > kMostRows - 8 * kTileColumns)
    return "there are 2^31 keys or more";
  if (p.batch * ceil_div(p.n, kSweepRows) * kSweepRows > kMostRows) {
    return "there are 2^31 queries or more";
  }
  if (p.batch * tiles_of(p) > kMostRows) return "the keys need more blocks than a launch can have";
  if (!is_dense(p.query, p.n, p.d) || !is_dense(p.key, p.m, p.d)) {
    return "query or key is not contiguous";
  }
  return nullptr;
}

HopperChoices choose(const SelectParams& p, HopperChoices given) {
  HopperChoices c = given;
  if (c.multiprocessors == 0) c.multiprocessors = multiprocessors_of_device();
  const int64_t tiles = tiles_of(p), items = blocks_of(p);
  c.splits = int(std::min<int64_t>(c.splits, tiles));
  const int most_step = most_sample_step(p.k);
  if (c.splits == 0) {
    const int64_t fewest = ceil_div(tiles, kMostTiles), most = std::max(fewest, tiles / 8);
    c.splits = int(fewest);
    for (int splits = c.splits + 1; splits <= std::min<int64_t>(most, fewest + 15); ++splits) {
      if (cost(items, tiles, splits, c.multiprocessors, most_step) <
          cost(items, tiles, c.splits, c.multiprocessors, most_step)) {
        c.splits = splits;
      }
    }
  }
  if (c.step == 0) {
    // The k-th of a sample is a useful bound if the sample has several times k columns.
    const int64_t each = tiles / c.splits;
    c.step = most_step;
    while (c.step > 1 && ceil_div(each, c.step) * kTileColumns < 8 * p.k) --c.step;
  }
  return c;
}

void hopper_forward(const SelectParams& p, const AggregateParams* a, Context& context,
                    HopperChoices given) {
  if (p.batch == 0 || p.n == 0) return;
  const bool in_finish = a && finish_aggregates(p, *a);
  const HopperChoices choices = choose(p, given);
  if (p.dtype == DType::float16) {
    forward_as<Float16>(p, in_finish ? a : nullptr, choices, context);
  } else {
    forward_as<BFloat16>(p, in_finish ? a : nullptr, choices, context);
  }
  if (!a || in_finish) return;
  if (!choices.portable && !hopper_dense_refuses(*a)) {
    hopper_aggregate_dense(*a, context, choices.multiprocessors);
  } else {
    aggregate(*a, context);
  }
}

}  // namespace convnn::cuda
