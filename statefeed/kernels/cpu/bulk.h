// Large products over all rows at once: inputs times packed weights, and weight gradients.
#pragma once

#include <algorithm>

#include "memory.h"
#include "product.h"
#include "threads.h"

namespace statefeed {

constexpr int bulk_vectors = 2;
constexpr int bulk_depth = 384;  // rows whose packed panels stay in cache, and no power of two: those share cache sets
constexpr int bulk_group = 4;    // tiles packed together, so that whole cache lines of every row are used
template <class T>
constexpr int bulk_rows_size = bulk_depth * max_rows<T, bulk_vectors> + lanes<T>;

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

template <class P>
struct Product {
  int64_t rows, depth, units, a_stride, out_stride;
  const typename P::Out* a;
  const typename P::In* packed;
  const typename P::Out* bias;
  typename P::Out* out;
  bool add;
};

// out (rows, units) = a (rows, depth) @ packed (+ bias) (+ out)
template <class P>
void product(const Product<P>& s) {
  using T = typename P::Out;
  constexpr int N = bulk_vectors, L = lanes<T>, M = max_rows<T, N>;
  constexpr int64_t block = 8 * M;  // rows that stay in cache while all panels pass by
  const int64_t panels = panel_count(s.units, N * L), tiles = panel_count(s.rows, M), depth = packed_depth<P>(s.depth), panel = depth * N * L;
  const int64_t threads = s.rows * s.units * s.depth < 100000 ? 1 : thread_count();
  const bool by_rows = tiles >= 4 * threads;
  const int64_t ranks = std::max<int64_t>(1, std::min(threads, by_rows ? tiles : panels));
  each_rank(ranks, [&](int64_t begin, int64_t end) {
    const int64_t rank_end = end - 1;
    const Range own_tiles = by_rows ? Range{share(tiles, begin, ranks).begin, share(tiles, rank_end, ranks).end} : Range{0, tiles};
    const Range own_panels = by_rows ? Range{0, panels} : Range{share(panels, begin, ranks).begin, share(panels, rank_end, ranks).end};
    const int64_t last_row = std::min(own_tiles.end * M, s.rows);
    alignas(64) T sum[tile_size<T, bulk_vectors>];
    for (int64_t from = own_tiles.begin * M; from < last_row; from += block) {
      int64_t stride = s.a_stride;
      const typename P::In* a = P::rows(s.a + from * s.a_stride, std::min(block, last_row - from), s.depth, stride);
      for (int64_t p = own_panels.begin; p < own_panels.end; ++p)
        for (int64_t row = from; row < std::min(from + block, last_row); row += M) {
          const int64_t count = std::min<int64_t>(M, last_row - row), unit = p * N * L;
          tile_of<P, N>(count, a + (row - from) * stride, stride, s.packed + p * panel, depth, sum);
          put_tile(sum, count, std::min<int64_t>(N * L, s.units - unit), s.bias ? s.bias + unit : nullptr, s.add,
                   s.out + row * s.out_stride + unit, s.out_stride);
        }
    }
  });
}

template <class T>
struct RowSum {
  int64_t rows, units, inputs, a_stride, b_stride, out_stride;
  const T *a, *b;
  T* out;
};

// One vector of a row, joined with the same of the next row where the product takes pairs.
template <class P, class T = typename P::Out>
inline Vector<typename P::In> joined(const T* row, int64_t stride, int64_t rows, int inside) {
  return P::join(load(row, inside), P::pack > 1 && rows > 1 ? load(row + stride, inside) : Vector<T>{});
}

// out (units, inputs) += a (rows, units)^T @ b (rows, inputs)
template <class P>
void add_row_products(const RowSum<typename P::Out>& s) {
  using T = typename P::Out;
  using In = typename P::In;
  constexpr int N = bulk_vectors, L = lanes<T>, M = max_rows<T, N>, width = N * L;
  constexpr int64_t depth = bulk_depth;
  const int64_t panels = panel_count(s.inputs, width), tiles = panel_count(s.units, M);
  const int64_t threads = s.rows * s.units * s.inputs < 100000 ? 1 : thread_count();
  In* packed = scratch<In, Use::packed_rows>(panels * width * std::min(depth, s.rows));
  for (int64_t from = 0; from < s.rows; from += depth) {
    const int64_t count = std::min(depth, s.rows - from), packed_count = packed_depth<P>(count);
    each_rank(std::min(threads, panels), [&](int64_t begin, int64_t end) {
      const int64_t ranks = std::min(threads, panels);
      for (int64_t p = share(panels, begin, ranks).begin; p < share(panels, end - 1, ranks).end; ++p)
        for (int64_t k = 0; k < count; k += P::pack)
          for (int j = 0; j < N; ++j) {
            const int64_t unit = p * width + j * L, inside = std::clamp<int64_t>(s.inputs - unit, 0, L);
            store(packed + (p * packed_count + k / P::pack) * width + j * L,
                  joined<P>(s.b + (from + k) * s.b_stride + unit, s.b_stride, count - k, static_cast<int>(inside)));
          }
    });
    const int64_t ranks = std::min(threads, tiles);
    each_rank(ranks, [&](int64_t begin, int64_t end) {
      alignas(64) T sum[tile_size<T, bulk_vectors>];
      alignas(64) In rows[bulk_group][bulk_rows_size<T>];
      const int64_t last = share(tiles, end - 1, ranks).end;
      for (int64_t first = share(tiles, begin, ranks).begin; first < last; first += bulk_group) {
        const int64_t group = std::min<int64_t>(bulk_group, last - first);
        for (int64_t k = 0; k < count; k += P::pack)
          for (int64_t i = 0; i < group; ++i) {
            const int64_t unit = (first + i) * M;
            const T* row = s.a + (from + k) * s.a_stride + unit;
            __builtin_prefetch(row + 12 * s.a_stride);
            // A whole vector may reach into the next depth's place, which is filled next.
            for (int64_t m = 0; m < M && unit + m < s.units; m += L)
              store(rows[i] + k / P::pack * M + m,
                    joined<P>(row + m, s.a_stride, count - k, static_cast<int>(std::min<int64_t>(L, s.units - unit - m))));
          }
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t i = 0; i < group; ++i) {
            const int64_t unit = (first + i) * M, inside = std::min<int64_t>(M, s.units - unit);
            tile_of<P, N, true>(inside, rows[i], M, packed + p * packed_count * width, packed_count, sum);
            put_tile(sum, inside, std::min<int64_t>(width, s.inputs - p * width), static_cast<const T*>(nullptr), true,
                     s.out + unit * s.out_stride + p * width, s.out_stride);
          }
      }
    });
  }
}

}  // namespace statefeed
