// Column sums over the rows of a chunk, for bias gradients, and the sum of the two biases of a cell.
#pragma once

#include <algorithm>

#include "simd.h"
#include "traits.h"

namespace statefeed {

// totals (units) += column sums of rows (rows, units). Blocks of few rows are summed in T, and the blocks in double,
// so that the error does not grow with the number of rows. A task: an item is a vector of units.
template <class T>
struct ColumnSums {
  static constexpr int L = lanes<T>, accumulators = 4;
  static constexpr int64_t block = 16;
  int64_t rows, units, stride;
  const T* from;
  double* totals;  // null: no sums are needed

  int64_t items() const { return totals ? panel_count(units, L) : 0; }
  void run(int64_t item) const {
    const int64_t unit = item * L;
    const int inside = static_cast<int>(std::min<int64_t>(L, units - unit));
    double total[L] = {};
    for (int64_t first = 0; first < rows; first += block) {
      Vector<T> sum[accumulators] = {};
      const int64_t count = std::min(block, rows - first);
      const T* row = from + first * stride + unit;
      for (int64_t i = 0; i < count; ++i, row += stride) sum[i % accumulators] += load(row, inside);
      const Vector<T> whole = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      for (int i = 0; i < L; ++i) total[i] += static_cast<double>(whole[i]);
    }
    for (int i = 0; i < inside; ++i) totals[unit + i] += total[i];
  }
};

// to (units): b_ih, and for the first `shared` units b_hh added.
template <class T>
const T* add_shared_biases(const T* b_ih, const T* b_hh, int64_t shared, int64_t units, T* to) {
  for (int64_t u = 0; u < units; ++u) to[u] = u < shared ? b_ih[u] + b_hh[u] : b_ih[u];
  return to;
}

}  // namespace statefeed
