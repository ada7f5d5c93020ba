// SPDX-License-Identifier: MIT
// Sums over the pairs of a row of key, from the inverse neighbor list.
//
// A row that many queries chose has a long run of pairs, which one block would walk for long. So
// the list is cut, without regard to rows, into chunks of equally many pairs, and what a kernel
// sums over pairs is first summed for each chunk that lies within one run, by a block of its own.
// A run is then summed from its pairs before its first chunk and behind its last, and from the
// sums of its chunks: always the same terms in the same order.
#pragma once

#include "device.cuh"
#include "inverse_list.h"

namespace convnn::cuda {

struct Run {
  int64_t first, last;          // the pairs at places first <= at < last of the list
  int64_t first_chunk, chunks;  // those that lie within, to be taken as sums
};

// The run of pairs at places first <= at < last.
__device__ inline Run run_between(const InverseList& list, int64_t first, int64_t last) {
  const int64_t begin = (first + list.chunk - 1) / list.chunk, end = last / list.chunk;
  return {first, last, begin, begin < end ? end - begin : 0};
}
// All pairs of one chunk, one by one.
__device__ inline Run run_of_chunk(const InverseList& list, int64_t chunk) {
  return {chunk * list.chunk, (chunk + 1) * list.chunk, 0, 0};
}
// The row that all pairs of a chunk chose, or -1: there is none.
__device__ inline int64_t row_of_chunk(const InverseList& list, int64_t chunk) {
  const Run run = run_of_chunk(list, chunk);
  const int64_t row = list.rows[list.pairs[run.first]];
  return row < list.row_count && row == list.rows[list.pairs[run.last - 1]] ? row : -1;
}

// Calls of_pair(pair) for the pairs of a run that are in no chunk within it, and of_chunk(chunk)
// for those chunks: every workers-th of each, from `worker`.
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
