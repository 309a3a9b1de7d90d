// Large products over all rows of a chunk, as tasks: inputs times packed weights, and weight gradients.
#pragma once

#include <algorithm>
#include <type_traits>

#include "memory.h"
#include "product.h"
#include "threads.h"

namespace statefeed {

constexpr int bulk_vectors = 2;
constexpr int bulk_depth = 384;  // rows whose packed panels stay in cache, and no power of two: those share cache sets
template <class P>  // tiles of one item
constexpr int bulk_group = max_rows<P, bulk_vectors> < 16 ? 4 : 2;

// The place of the tile that comes next: a place is read when its tile begins.
template <class P>
inline void prefetch_tile(const typename P::Out* out, int64_t rows, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < bulk_vectors; ++j) __builtin_prefetch(out + i * stride + j * lanes<typename P::Out>, 1);
}

// A tile by way of a copy, where whole vectors or tiles reach beyond its place.
template <class P, class T, class Tile>
__attribute__((noinline)) void copy_tile(int64_t rows, int64_t width, const Place<T>& to, Tile tile) {
  constexpr int64_t full = bulk_vectors * lanes<T>;
  alignas(64) T copy[tile_size<P, bulk_vectors>] = {};
  for (int64_t i = 0; to.start && i < rows; ++i) std::copy_n(to.start + i * to.start_stride, width, copy + i * full);
  tile(Place<T>{copy, full, to.start ? copy : nullptr, full});
  for (int64_t i = 0; i < rows; ++i) std::copy_n(copy + i * full, width, to.out + i * to.stride);
}

// out (rows, width) = (bias or out) + a tile of `rows`
template <class P, class T, class Tile>
inline void put_tile(int64_t rows, int64_t width, const T* bias, bool add, T* out, int64_t stride, Tile tile) {
  const Place<T> to{out, stride, add ? out : bias, add ? stride : 0};
  if (width == bulk_vectors * lanes<T> && rows % P::side == 0) return tile(to);
  copy_tile<P>(rows, width, to, tile);
}

// out (rows, units) = a (rows, depth) @ packed (+ bias) (+ out)
// A: what a holds, plain numbers or what the product takes.
template <class P, class A = typename P::Out>
struct Product {
  typedef typename P::Out T;
  static constexpr int N = bulk_vectors, L = lanes<T>, M = max_rows<P, N>;
  static constexpr int64_t block = bulk_group<P> * M;  // rows that stay in cache while all panels pass by
  int64_t rows, depth, units, a_stride, out_stride;
  const A* a;
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
    int64_t stride = a_stride;
    const typename P::In* from;
    if constexpr (std::is_same_v<A, typename P::In>)
      from = a + first * a_stride;
    else
      from = P::rows(a + first * a_stride, last - first, depth, stride);
    for (int64_t p = panels.begin; p < panels.end; ++p)
      for (int64_t row = first; row < last; row += M) {
        const int64_t count = std::min<int64_t>(M, last - row), unit = p * N * L;
        prefetch_tile<P>(out + (row + M) * out_stride + unit, std::min<int64_t>(M, last - row - M), out_stride);
        put_tile<P>(count, std::min<int64_t>(N * L, units - unit), bias ? bias + unit : nullptr, add,
                    out + row * out_stride + unit, out_stride, [&](const Place<T>& to) {
                      tile_of<P, N>(count, from + (row - first) * stride, stride, packed + p * panel, packed_depth<P>(depth), to);
                    });
      }
  }
};

// Rows (rows, units) as panels whose depth is the rows: the right side of RowProducts. Where the product takes them as they
// are nothing is packed, and vectors may reach beyond the last unit.
template <class P>
struct RowPanels {
  typedef typename P::Out T;
  typedef typename P::In In;
  static constexpr int N = bulk_vectors, L = lanes<T>;
  static constexpr bool packed = P::pack > 1;
  int64_t rows, units, row_stride;
  const T* from;
  In* to;  // null if not packed

  int64_t count() const { return panel_count(units, N * L); }
  int64_t stride() const { return packed ? N * L : row_stride; }
  int64_t size() const { return packed ? count() * panel_size() : 0; }
  const In* panel(int64_t p) const {
    if constexpr (packed)
      return to + p * panel_size();
    else
      return from + p * N * L;
  }

  int64_t items() const { return packed ? count() : 0; }
  void run(int64_t p) const {
    for (int64_t k = 0; k < packed_rows(); k += P::pack) put(p, k);
  }
  // The rows that are joined at k; there may be none.
  void put(int64_t p, int64_t k) const {
    for (int j = 0; j < N; ++j) {
      const int64_t unit = (p * N + j) * L, inside = std::clamp<int64_t>(units - unit, 0, L);
      store(to + p * panel_size() + (k / P::pack * N + j) * L,
            joined<P>(from + k * row_stride + unit, row_stride, rows - k, static_cast<int>(inside)));
    }
  }
  int64_t packed_rows() const { return packed_depth<P>(rows) * P::pack; }

 private:
  int64_t panel_size() const { return packed_depth<P>(rows) * N * L; }
};

// The same of rows that hold what the product takes, put there by somebody who has them in cache.
template <class P>
struct OwnPanels {
  typedef typename P::Out T;
  typedef typename P::In In;
  static constexpr int N = bulk_vectors, L = lanes<T>;
  static_assert(N == 2 && P::pack <= 2);
  int64_t rows, units;
  In* to;

  int64_t count() const { return panel_count(units, N * L); }
  int64_t stride() const { return N * L; }
  int64_t size() const { return count() * panel_size(); }
  const In* panel(int64_t p) const { return to + p * panel_size(); }
  // The rows to put, in pairs where the product takes pairs; those that are not there are zeros.
  int64_t packed_rows() const { return packed_depth<P>(rows) * P::pack; }
  void put(int64_t p, int64_t k, const In* above, const In* below) const {
    In* at = to + p * panel_size() + k / P::pack * N * L;
    Vector<In> first, second;
    P::interleave(above, below, first, second);
    store(at, first), store(at + L, second);
  }

 private:
  int64_t panel_size() const { return packed_depth<P>(rows) * N * L; }
};

// Rows (rows, units) as tiles whose depth is the rows: the left side of RowProducts.
template <class P>
struct RowTiles {
  typedef typename P::Out T;
  typedef typename P::In In;
  static constexpr int M = max_rows<P, bulk_vectors>, L = lanes<T>;
  int64_t rows, units;
  const T* from;
  In* to;

  // A whole vector may reach into the next depth's place, which is filled next.
  int64_t tile_size() const { return packed_depth<P>(rows) * M + L; }
  int64_t size() const { return items() * tile_size(); }
  const In* tile(int64_t i) const { return to + i * tile_size(); }

  int64_t items() const { return panel_count(units, M); }
  void run(int64_t i) const {
    const int64_t first = i * M;
    In* at = to + i * tile_size();
    for (int64_t k = 0; k < rows; k += P::pack * P::side, at += P::side * M)
      for (int64_t m = 0; m < M && first + m < units; m += L) {
        const int inside = static_cast<int>(std::min<int64_t>(L, units - first - m));
        Vector<In> square[P::side];
        for (int64_t q = 0; q < P::side; ++q) {
          const int64_t row = k + q * P::pack;
          square[q] = joined<P>(from + row * units + first + m, units, rows - row, inside);
        }
        P::turn(square);
        for (int64_t q = 0; q < P::side; ++q) store(at + m * P::side + q * L, square[q]);
      }
  }
};

// out (inputs, units) = left (rows, inputs)^T @ right (rows, units) (+ out)
template <class P, class Right = RowPanels<P>>
struct RowProducts {
  typedef typename P::Out T;
  static constexpr int N = bulk_vectors, L = lanes<T>, M = max_rows<P, N>;
  const RowTiles<P>& left;
  const Right& right;
  T* out;
  int64_t out_stride;
  bool add;

  int64_t items() const { return right.count(); }
  void run(int64_t p) const {
    const int64_t unit = p * N * L, width = std::min<int64_t>(N * L, right.units - unit);
    for (int64_t from = 0; from < right.rows; from += bulk_depth) {
      const int64_t depth = std::min<int64_t>(bulk_depth, right.rows - from), at = from / P::pack;
      for (int64_t i = 0; i < left.items(); ++i) {
        const int64_t first = i * M, inside = std::min<int64_t>(M, left.units - first);
        T* to = out + first * out_stride + unit;
        prefetch_tile<P>(to + M * out_stride, std::min<int64_t>(M, left.units - first - M), out_stride);
        put_tile<P>(inside, width, static_cast<const T*>(nullptr), add || from, to, out_stride, [&](const Place<T>& place) {
          turned_tile_of<P, N>(inside, left.tile(i) + at * M, right.panel(p) + at * right.stride(), right.stride(),
                               packed_depth<P>(depth), place);
        });
      }
    }
  }
};

// out (units, inputs) = from (inputs, units)^T, rows of `stride`
template <class T>
struct Turning {
  static constexpr int L = lanes<T>;
  int64_t units, inputs, stride;
  const T* from;
  T* out;

  int64_t items() const { return panel_count(units, L); }
  void run(int64_t item) const {
    const int64_t first = item * L, last = std::min<int64_t>(first + L, units);
    for (int64_t i = 0; i < inputs; ++i) {
      __builtin_prefetch(from + (i + 16) * stride + first);
      for (int64_t u = first; u < last; ++u) out[u * inputs + i] = from[i * stride + u];
    }
  }
};

}  // namespace statefeed
