// Chunks of time whose rows stay in cache, and the states before the steps of a chunk.
#pragma once

#include <algorithm>
#include <vector>

#include "bulk.h"
#include "cell.h"

namespace statefeed {

struct Chunk {
  int64_t first_step, steps, first_row, rows;
  int64_t batch, batch_before;  // rows of its first step, and of the step before
};

constexpr int64_t chunk_rows = bulk_depth;

inline std::vector<Chunk> chunks_of(const StepRange& range) {
  std::vector<Chunk> chunks;
  for (int64_t t = 0, row = 0; t < range.steps;) {
    Chunk chunk{.first_step = t,
                .steps = 0,
                .first_row = row,
                .rows = 0,
                .batch = range.size(t),
                .batch_before = t ? range.size(t - 1) : 0};
    for (; t < range.steps && (chunk.steps == 0 || chunk.rows + range.size(t) <= chunk_rows); ++t, ++chunk.steps)
      chunk.rows += range.size(t);
    row += chunk.rows;
    chunks.push_back(chunk);
  }
  return chunks;
}

inline int64_t most_rows(const std::vector<Chunk>& chunks) {
  int64_t most = 0;
  for (const Chunk& chunk : chunks) most = std::max(most, chunk.rows);
  return most;
}

inline StepRange range_of_chunk(const StepRange& range, const Chunk& chunk) {
  return {.steps = chunk.steps,
          .batch = chunk.batch,
          .hidden = range.hidden,
          .output = range.output,
          .rows = chunk.rows,
          .batch_sizes = range.batch_sizes ? range.batch_sizes + chunk.first_step : nullptr};
}

// to (rows, units) = from (+ bias), rows of other strides: the product with W_ih and its gradient where there is none.
// A null `to` is no work.
template <class T>
struct RowCopies {
  static constexpr int64_t block = 16;
  int64_t rows, units, from_stride, to_stride;
  const T* from;
  const T* bias = nullptr;
  T* to = nullptr;

  int64_t items() const { return to ? panel_count(rows, block) : 0; }
  void run(int64_t item) const {
    for (int64_t row = item * block; row < std::min(rows, (item + 1) * block); ++row)
      for (int64_t u = 0; u < units; ++u)
        to[row * to_stride + u] = from[row * from_stride + u] + (bias ? bias[u] : T(0));
  }
};

// The states before the steps of a chunk, in the same order as the rows of its gradients. They are in y, one step
// earlier, except before the first step and where sequences end: there a step has fewer rows than the previous one.
template <class T>
struct StatesBefore {
  const StepRange& range;
  const Chunk& chunk;
  const T* y;
  const T* first;  // before the chunk's first step
  T* copy;

  bool in_y() const { return !range.batch_sizes && chunk.first_row; }
  const T* rows() const { return in_y() ? first : copy; }
  int64_t items() const { return in_y() ? 0 : 1; }
  void run(int64_t) const {
    const int64_t O = range.output;
    T* to = std::copy(first, first + chunk.batch * O, copy);
    const T* from = y + chunk.first_row * O;
    for (int64_t t = chunk.first_step + 1; t < chunk.first_step + chunk.steps; from += range.size(t - 1) * O, ++t)
      to = std::copy(from, from + range.size(t) * O, to);
  }
};

// The same weights with memory to pack them into, if they are needed.
template <ProductTraits P, Tag tag>
PackedWeights<P> with_memory(PackedWeights<P> weights, bool wanted = true) {
  weights.to = wanted ? workspace<typename P::packed_t, tag>(weights.size()) : nullptr;
  return weights;
}

}  // namespace statefeed
