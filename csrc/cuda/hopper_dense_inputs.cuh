// SPDX-License-Identifier: MIT
// What hopper_dense_kernel reads, in the order in which it reads it.
//
// Channels come in pieces of 8, 16 bytes. A chunk is what is multiplied at a time: 8 pieces of each
// query, gathered from rows of V, and as many of W. Chunks are in the order of blocks of 8 pieces
// of the channels, and of neighbors within each: while a block of queries of few images is
// computed, the part of V that a block of channels needs stays in L1.
//
// Without rho, a chunk is filled with pieces of as many neighbors as needed: 3 channels, 9
// neighbors take two. With rho, it has one neighbor.
#pragma once

#include "aggregate.cuh"

namespace convnn::cuda {

constexpr int kPieceChannels = 8;
constexpr int kChunkPieces = 8;
constexpr int kChunkColumns = kPieceChannels * kChunkPieces;

// A piece of a chunk: which neighbor, and which piece of its row; j is -1 if it is none: zeros.
struct DensePiece {
  int j, piece;
};

struct DenseChunks {
  int k, pieces;   // neighbors, and pieces of a row of V
  bool is_packed;  // whether chunks have pieces of several neighbors

  __host__ __device__ int blocks() const { return (pieces + kChunkPieces - 1) / kChunkPieces; }
  // Pieces of each neighbor in a block.
  __host__ __device__ int width(int block) const {
    const int left = pieces - block * kChunkPieces;
    return left < kChunkPieces ? left : kChunkPieces;
  }
  // Chunks of a block; k of each but the last.
  __host__ __device__ int in_block(int block) const {
    return is_packed ? (k * width(block) + kChunkPieces - 1) / kChunkPieces : k;
  }
  __host__ __device__ int count() const { return (blocks() - 1) * k + in_block(blocks() - 1); }
  // Piece x of a chunk of a block.
  __device__ DensePiece piece(int block, int chunk, int x) const {
    const int wide = width(block);
    if (!is_packed || wide == kChunkPieces) {
      return {x < wide ? chunk : -1, block * kChunkPieces + x};
    }
    const int at = chunk * kChunkPieces + x, j = at / wide;
    return {j < k ? j : -1, block * kChunkPieces + at % wide};
  }
};

template <class T>
__device__ inline uint4 pack_piece(const T (&values)[kPieceChannels]) {
  const auto two = [&](int i) {
    return uint32_t(values[i].bits) | uint32_t(values[i + 1].bits) << 16;
  };
  return {two(0), two(2), two(4), two(6)};
}

// In place of the first piece of a row of V, for a missing neighbor.
constexpr uint32_t kNoPieces = 0xFFFFFFFFu;

// W in chunks, a thread storing one piece; and the bias, padded with zeros.
template <class T>
__global__ __launch_bounds__(kThreads) void dense_weight_kernel(
    const T* weight,     // [o, c, k]
    const T* bias,       // [o] or null
    uint4* result,       // [o, chunks, 8] pieces; zeros where a chunk has none
    float* padded_bias,  // [o_padded]
    int64_t o, int64_t o_padded, int64_t c, DenseChunks chunks) {
  const int64_t count = chunks.count();
  for (int64_t i = grid_thread(); i < o_padded; i += grid_threads()) {
    padded_bias[i] = bias && i < o ? widen(bias[i]) : 0;
  }
  for (int64_t i = grid_thread(); i < o * count * kChunkPieces; i += grid_threads()) {
    const int64_t output = i / kChunkPieces / count;
    const int chunk = int(i / kChunkPieces % count);
    const DensePiece of = chunks.piece(chunk / chunks.k, chunk % chunks.k, int(i % kChunkPieces));
    T piece[kPieceChannels] = {};
#pragma unroll
    for (int e = 0; e < kPieceChannels; ++e) {
      const int64_t channel = int64_t(of.piece) * kPieceChannels + e;
      if (of.j >= 0 && channel < c) piece[e] = weight[(output * c + channel) * chunks.k + of.j];
    }
    result[i] = pack_piece(piece);
  }
}

// V with rows of whole pieces.
template <class T>
__global__ __launch_bounds__(kThreads) void dense_value_kernel(const T* value,  // [rows, c]
                                                               uint4* result,   // [rows, pieces]
                                                               int64_t rows, int64_t c,
                                                               int pieces) {
  for (int64_t i = grid_thread(); i < rows * pieces; i += grid_threads()) {
    T piece[kPieceChannels] = {};
#pragma unroll
    for (int e = 0; e < kPieceChannels; ++e) {
      const int64_t channel = i % pieces * kPieceChannels + e;
      if (channel < c) piece[e] = value[i / pieces * c + channel];
    }
    result[i] = pack_piece(piece);
  }
}

// Neighbors and rho one j after the other. A thread has a query.
template <class T>
__global__ __launch_bounds__(kThreads, 8) void dense_neighbors_kernel(
    const AggregateWork<T> w, int64_t rows_padded, int pieces,
    uint32_t* neighbors,  // [k, rows_padded]: the first piece of the row of V
    float* rho) {         // [k, rows_padded], or null
  const AggregateParams& p = w.p;
  for (int64_t row = grid_thread(); row < rows_padded; row += grid_threads()) {
    const bool is_query = row < p.batch * p.n;
    for (int64_t j = 0; j < p.k; ++j) {
      const int64_t value_row = is_query ? w.value_row(row, j) : -1;
      neighbors[j * rows_padded + row] = value_row < 0 ? kNoPieces : uint32_t(value_row * pieces);
      if (rho) rho[j * rows_padded + row] = is_query ? w.rho_of(row, j) : 0;
    }
  }
}

}  // namespace convnn::cuda
