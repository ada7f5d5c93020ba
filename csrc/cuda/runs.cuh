// SPDX-License-Identifier: MIT
// Sums over the pairs of a row of key, from the inverse neighbor list.
//
// A row that many queries chose has a long run of pairs, too long for one block. So the list is
// divided, regardless of rows, into chunks of equal size, and separate blocks first sum each chunk
// that lies within one run. A run is then summed from the sums of its chunks and from the pairs
// before the first and after the last of them: always the same terms in the same order.
#pragma once

#include "device.cuh"
#include "inverse_list.h"

namespace convnn::cuda {

struct Run {
  int64_t first, last;          // the pairs at positions first <= at < last of the list
  int64_t first_chunk, chunks;  // the chunks that lie within, whose sums are used
};

// The run of pairs at positions first <= at < last.
__device__ inline Run run_between(const InverseList& list, int64_t first, int64_t last) {
  const int64_t begin = (first + list.chunk - 1) / list.chunk, end = last / list.chunk;
  return {first, last, begin, begin < end ? end - begin : 0};
}
// All pairs of one chunk, without the sums of chunks.
__device__ inline Run run_of_chunk(const InverseList& list, int64_t chunk) {
  return {chunk * list.chunk, (chunk + 1) * list.chunk, 0, 0};
}
// The row that all pairs of a chunk chose, or -1 if there is no such row.
__device__ inline int64_t row_of_chunk(const InverseList& list, int64_t chunk) {
  const Run run = run_of_chunk(list, chunk);
  const int64_t row = list.rows[list.pairs[run.first]];
  return row < list.row_count && row == list.rows[list.pairs[run.last - 1]] ? row : -1;
}

// Calls of_chunk(chunk) for the chunks within a run and of_pair(pair) for its other pairs: every
// workers-th of each, starting with number `worker`.
template <class OfPair, class OfChunk>
__device__ inline void for_each_term(const InverseList& list, const Run& run, int worker,
                                     int workers, const OfPair& of_pair, const OfChunk& of_chunk) {
  const int64_t before_chunks = run.first_chunk * list.chunk - run.first;
  const int64_t in_chunks = run.chunks * list.chunk;
  for (int64_t i = worker; i < run.last - run.first - in_chunks; i += workers) {
    of_pair(list.pairs[run.first + (i < before_chunks ? i : i + in_chunks)]);
  }
  for (int64_t i = worker; i < run.chunks; i += workers) of_chunk(run.first_chunk + i);
}

}  // namespace convnn::cuda
