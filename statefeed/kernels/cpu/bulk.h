// Large products over all rows of a chunk, as tasks: inputs times packed weights, and weight gradients.
#pragma once

#include <algorithm>

#include "memory.h"
#include "product.h"
#include "threads.h"

namespace statefeed {

constexpr int bulk_vectors = 2;
constexpr int bulk_depth = 384;  // rows whose packed panels stay in cache, and no power of two: those share cache sets
template <class P>  // tiles of one item, packed together: whole cache lines of every row are used
constexpr int bulk_group = max_rows<P, bulk_vectors> < 16 ? 4 : 2;
template <class P>
constexpr int bulk_rows_size = bulk_depth / P::pack * max_rows<P, bulk_vectors> + lanes<typename P::Out>;

template <class T>
inline void put_tile(const T* sum, int64_t rows, int64_t width, const T* bias, bool add, T* out, int64_t stride) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t u = 0; u < width; u += L) {
      const int count = static_cast<int>(std::min<int64_t>(L, width - u));
      Vector<T> value = load(sum + i * bulk_vectors * L + u);
      if (bias) value += load(bias + u, count);
      if (add) value += load(out + i * stride + u, count);
      store(out + i * stride + u, value, count);
    }
}

// out (rows, units) = a (rows, depth) @ packed (+ bias) (+ out)
template <class P>
struct Product {
  typedef typename P::Out T;
  static constexpr int N = bulk_vectors, L = lanes<T>, M = max_rows<P, N>;
  static constexpr int64_t block = bulk_group<P> * M;  // rows that stay in cache while all panels pass by
  int64_t rows, depth, units, a_stride, out_stride;
  const T* a;
  const typename P::In* packed;
  const T* bias;
  T* out;
  bool add;

  int64_t blocks() const { return panel_count(rows, block); }
  // Few rows are shared out by units as well.
  int64_t stripes() const { return blocks() < 4 ? std::min<int64_t>(4, panel_count(units, N * L)) : 1; }
  int64_t items() const { return out ? blocks() * stripes() : 0; }
  void run(int64_t item) const {
    const int64_t panel = packed_depth<P>(depth) * N * L, first = item / stripes() * block, last = std::min(first + block, rows);
    const Range panels = share(panel_count(units, N * L), item % stripes(), stripes());
    alignas(64) T sum[tile_size<P, N>];
    int64_t stride = a_stride;
    const typename P::In* from = P::rows(a + first * a_stride, last - first, depth, stride);
    for (int64_t p = panels.begin; p < panels.end; ++p)
      for (int64_t row = first; row < last; row += M) {
        const int64_t count = std::min<int64_t>(M, last - row), unit = p * N * L;
        for (int64_t i = row; i < row + count; ++i)
          for (int j = 0; j < N; ++j) __builtin_prefetch(out + i * out_stride + unit + j * L, 1);
        tile_of<P, N>(count, from + (row - first) * stride, stride, packed + p * panel, packed_depth<P>(depth), sum);
        put_tile(sum, count, std::min<int64_t>(N * L, units - unit), bias ? bias + unit : nullptr, add,
                 out + row * out_stride + unit, out_stride);
      }
  }
};

// One vector of a row, joined with the same of the next row where the product takes pairs.
template <class P, class T = typename P::Out>
inline Vector<typename P::In> joined(const T* row, int64_t stride, int64_t rows, int inside) {
  if (P::side > 1 && rows <= 0) return Vector<typename P::In>{};
  return P::join_vectors(load(row, inside), P::pack > 1 && rows > 1 ? load(row + stride, inside) : Vector<T>{});
}

// Rows (rows, units) as panels whose depth is the rows: the right side of RowProducts.
template <class P>
struct RowPacking {
  typedef typename P::Out T;
  static constexpr int N = bulk_vectors, L = lanes<T>;
  int64_t rows, units;
  const T* from;
  typename P::In* to;

  int64_t items() const { return panel_count(units, N * L); }
  int64_t panel() const { return packed_depth<P>(rows) * N * L; }
  void run(int64_t item) const {
    for (int64_t k = 0; k < rows; k += P::pack)
      for (int j = 0; j < N; ++j) {
        const int64_t unit = (item * N + j) * L, inside = std::clamp<int64_t>(units - unit, 0, L);
        store(to + item * panel() + (k / P::pack * N + j) * L,
              joined<P>(from + k * units + unit, units, rows - k, static_cast<int>(inside)));
      }
    std::fill(to + item * panel() + (rows + P::pack - 1) / P::pack * N * L, to + (item + 1) * panel(), typename P::In(0));
  }
};

// out (units, inputs) = a (rows, units)^T @ b (rows, inputs) (+ out)
template <class P>
struct RowProducts {
  typedef typename P::Out T;
  typedef typename P::In In;
  static constexpr int N = bulk_vectors, L = lanes<T>, M = max_rows<P, N>;
  int64_t units, a_stride;
  const T* a;
  const RowPacking<P>& b;
  T* out;  // rows of b.units
  bool add;

  int64_t items() const { return panel_count(units, bulk_group<P> * M); }
  void run(int64_t item) const {
    for (int64_t from = 0; from < b.rows; from += bulk_depth) part(item, from, std::min<int64_t>(bulk_depth, b.rows - from));
  }
  void part(int64_t item, int64_t from, int64_t count) const {
    alignas(64) T sum[tile_size<P, N>];
    alignas(64) In rows[bulk_group<P>][bulk_rows_size<P>];
    const int64_t first = item * bulk_group<P>, group = std::min<int64_t>(bulk_group<P>, panel_count(units, M) - first);
    for (int64_t k = 0; k < count; k += P::pack * P::side)
      for (int64_t i = 0; i < group; ++i) {
        const int64_t unit = (first + i) * M;
        const T* row = a + (from + k) * a_stride + unit;
        __builtin_prefetch(row + 12 * a_stride);
        // A whole vector may reach into the next depth's place, which is filled next.
        for (int64_t m = 0; m < M && unit + m < units; m += L) {
          const int inside = static_cast<int>(std::min<int64_t>(L, units - unit - m));
          Vector<In> square[P::side];
          for (int64_t q = 0; q < P::side; ++q)
            square[q] = joined<P>(row + q * P::pack * a_stride + m, a_stride, count - k - q * P::pack, inside);
          P::turn(square);
          for (int64_t q = 0; q < P::side; ++q) store(rows[i] + k / P::pack * M + m * P::side + q * L, square[q]);
        }
      }
    for (int64_t p = 0; p < b.items(); ++p)
      for (int64_t i = 0; i < group; ++i) {
        const int64_t unit = (first + i) * M, inside = std::min<int64_t>(M, units - unit);
        for (int64_t u = unit; u < unit + inside; ++u)
          for (int j = 0; j < N; ++j) __builtin_prefetch(out + u * b.units + (p * N + j) * L, 1);
        tile_of<P, N, true>(inside, rows[i], M, b.to + p * b.panel() + from / P::pack * N * L, packed_depth<P>(count), sum);
        put_tile(sum, inside, std::min<int64_t>(N * L, b.units - p * N * L), static_cast<const T*>(nullptr), add || from,
                 out + unit * b.units + p * N * L, b.units);
      }
  }
};

}  // namespace statefeed
