// SPDX-License-Identifier: MIT
#include "hopper_dense.h"

#include "hopper_dense.cuh"
#include "modulate.cuh"

namespace convnn::cuda {
namespace {

int count_multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) return count;
  throw std::runtime_error(std::string("convnn: the number of multiprocessors is unknown: ") +
                           cudaGetErrorString(error));
#else
  return 132;
#endif
}

int64_t pieces_of(const AggregateParams& p) { return ceil_div(p.c, kPieceChannels); }

// V with rows of whole pieces: as it is, or a copy.
template <class T>
const uint4* value_in_pieces(const AggregateParams& p, Context& context) {
  if (p.c % kPieceChannels == 0 && is_aligned16(p.value.data)) {
    return static_cast<const uint4*>(p.value.data);
  }
  const int64_t count = p.batch * p.m * pieces_of(p);
  uint4* result = allocate<uint4>(context, count);
  launch("dense_value_kernel", dense_value_kernel<T>, strided_blocks(count), 0, context,
         static_cast<const T*>(p.value.data), result, p.batch * p.m, p.c, int(pieces_of(p)));
  return result;
}

// W as the kernel reads it. Sets the bias, too.
template <class T>
TensorMap weight_in_chunks(const AggregateParams& p, HopperDense<T>& dense, int columns,
                           Context& context) {
  const int64_t pieces = int64_t(dense.chunks.count()) * kChunkPieces;
  const int64_t o_padded = dense.output_blocks * columns;
  uint4* result = allocate<uint4>(context, p.o * pieces);
  float* bias = allocate<float>(context, o_padded);
  launch("dense_weight_kernel", dense_weight_kernel<T>, strided_blocks(p.o * pieces), 0, context,
         static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), result, bias, p.o,
         o_padded, p.c, dense.chunks);
  dense.bias = bias;
  return map_rows(reinterpret_cast<const T*>(result), 1, p.o, pieces * kPieceChannels, columns);
}

template <class T, int kUnits, int kColumns, bool kModulated>
void run(const AggregateParams& p, int multiprocessors, Context& context) {
  using Shared = DenseShared<kUnits, kColumns>;
  const int64_t rows = p.batch * p.n, row_blocks = ceil_div(rows, Shared::kRows);
  HopperDense<T> dense = {};
  dense.w.p = p;
  dense.w.rho = kModulated ? modulate<float>(p, context) : nullptr;
  dense.rows_padded = row_blocks * Shared::kRows;
  dense.chunks = {int(p.k), int(pieces_of(p)), !kModulated};
  dense.output_blocks = ceil_div(p.o, kColumns);
  dense.tiles = row_blocks * dense.output_blocks;
  dense.stores_pieces = p.o % kPieceChannels == 0 && is_aligned16(p.output);
  uint32_t* neighbors = allocate<uint32_t>(context, p.k * dense.rows_padded);
  float* rho = kModulated ? allocate<float>(context, p.k * dense.rows_padded) : nullptr;
  launch("dense_neighbors_kernel", dense_neighbors_kernel<T>, strided_blocks(dense.rows_padded), 0,
         context, dense.w, dense.rows_padded, dense.chunks.pieces, neighbors, rho);
  dense.neighbors = neighbors;
  dense.rho = rho;
  dense.value = value_in_pieces<T>(p, context);
  const TensorMap weight = weight_in_chunks<T>(p, dense, kColumns, context);
  launch_hopper("hopper_dense_kernel", hopper_dense_kernel<T, kUnits, kColumns, kModulated>,
                std::min<int64_t>(dense.tiles, multiprocessors), kDenseThreads, sizeof(Shared),
                /*dependent=*/false, context, weight, dense);
}

template <class T, int kUnits, int kColumns>
void run(const AggregateParams& p, int multiprocessors, Context& context) {
  if (p.rho == Rho::ones) return run<T, kUnits, kColumns, false>(p, multiprocessors, context);
  run<T, kUnits, kColumns, true>(p, multiprocessors, context);
}

// The largest tiles of which there are enough for the multiprocessors.
template <class T>
void run(const AggregateParams& p, int multiprocessors, Context& context) {
  const auto are_enough = [&](int rows, int columns) {
    return ceil_div(p.batch * p.n, rows) * ceil_div(p.o, columns) >= 0.8 * multiprocessors;
  };
  const bool is_narrow = p.o <= 64;
  if (!is_narrow && are_enough(256, 128)) return run<T, 2, 128>(p, multiprocessors, context);
  if (!is_narrow && are_enough(128, 128)) return run<T, 1, 128>(p, multiprocessors, context);
  if (is_narrow && are_enough(256, 64)) return run<T, 2, 64>(p, multiprocessors, context);
  run<T, 1, 64>(p, multiprocessors, context);
}

}  // namespace

const char* hopper_dense_refuses(const AggregateParams& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (p.convolution != Convolution::dense) return "the convolution is not dense";
  if (p.dtype != DType::float16 && p.dtype != DType::bfloat16) {
    return "its elements are not of 16 bits";
  }
  const bool is_dense = p.value.row_stride == p.c && !p.value.offsets &&
                        (p.batch == 1 || p.value.batch_stride == p.m * p.c);
  if (!is_dense) return "value is not contiguous";
  if (p.c < 1 || p.k < 1 || p.o < 1) return "there are no channels or neighbors";
  if (p.k * ceil_div(p.c, kChunkColumns) > kMost / kChunkColumns || p.o > kMost / 2) {
    return "the weight is too large";
  }
  if (p.batch * p.m > int64_t(kNoPieces) / pieces_of(p)) return "value is too large";
  return nullptr;
}

void hopper_aggregate_dense(const AggregateParams& p, Context& context, int multiprocessors) {
  if (p.batch == 0 || p.n == 0) return;
  if (multiprocessors == 0) multiprocessors = count_multiprocessors();
  if (p.dtype == DType::float16) return run<Float16>(p, multiprocessors, context);
  run<BFloat16>(p, multiprocessors, context);
}

}  // namespace convnn::cuda
