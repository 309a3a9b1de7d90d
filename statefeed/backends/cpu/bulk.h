// Large products over all rows of a chunk, as tasks: inputs times packed weights, and weight gradients.
//
// Layouts, all in packed_t (L lanes, N = bulk_vectors vectors, M = max_rows<P, N> rows of a tile):
//   PackedWeights   [panel of N * L units][k][N * L]                the right side of Product
//   RowPanels       [panel of N * L units][row / k_pack][N * L]     the right side of RowProducts: its depth is the
//   rows RowTiles        [tile of M units][row / (k_pack * tile_rows)][M][tile_rows]     the left side of RowProducts
// Row strides are never a power of two where the code can choose them: such rows share cache sets.
// Block-diagonal weights, as those of several heads: units, inputs and depth are those of one block, and the columns of
// a row and the panels of the weights are those of one block after another.
#pragma once

#include <algorithm>
#include <type_traits>

#include "product.h"
#include "threads.h"

namespace statefeed {

constexpr int bulk_vectors = 2;
constexpr int bulk_depth = 384;  // rows of a chunk: its packed panels stay in the second-level cache
template <ProductTraits P>       // tiles of one item
constexpr int bulk_group = max_rows<P, bulk_vectors> < 16 ? 4 : 2;

// What the next tile writes: a tile's output is read when the tile begins. Rows may be none or negative, and then the
// address, which may lie beyond the end, is not used.
template <ProductTraits P>
inline void prefetch_tile(const typename P::value_t* out, int64_t rows, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < bulk_vectors; ++j) __builtin_prefetch(out + i * stride + j * lanes<typename P::value_t>, 1);
}

// A tile through a copy, if whole vectors or whole tiles would reach beyond its output.
template <ProductTraits P, class T, class Tile>
__attribute__((noinline)) void copy_tile(int64_t rows, int64_t width, const TileOutput<T>& to, Tile tile) {
  constexpr int64_t full = bulk_vectors * lanes<T>;
  alignas(64) T copy[tile_size<P, bulk_vectors>] = {};
  for (int64_t i = 0; to.start && i < rows; ++i) std::copy_n(to.start + i * to.start_stride, width, copy + i * full);
  tile(TileOutput<T>{.out = copy, .stride = full, .start = to.start ? copy : nullptr, .start_stride = full});
  for (int64_t i = 0; i < rows; ++i) std::copy_n(copy + i * full, width, to.out + i * to.stride);
}

// out (rows, width) = (bias or out) + a tile of `rows`
template <ProductTraits P, class T, class Tile>
inline void store_tile(int64_t rows, int64_t width, const T* bias, bool add, T* out, int64_t stride, Tile tile) {
  const TileOutput<T> to{.out = out, .stride = stride, .start = add ? out : bias, .start_stride = add ? stride : 0};
  if (width == bulk_vectors * lanes<T> && rows % P::tile_rows == 0) return tile(to);
  copy_tile<P>(rows, width, to, tile);
}

// out (rows, units) = a (rows, depth) @ packed (+ bias) (+ out), for every block. A null `out` is no work.
// A: what a holds, value_t or packed_t.
template <ProductTraits P, class A = typename P::value_t>
struct Product {
  using T = typename P::value_t;
  static constexpr int N = bulk_vectors, L = lanes<T>, M = max_rows<P, N>;
  static constexpr int64_t group = bulk_group<P> * M;  // rows that stay in cache while all panels pass by
  int64_t rows, depth, units, a_stride, out_stride;
  const A* a;
  const typename P::packed_t* packed;
  const T* bias = nullptr;
  T* out = nullptr;
  bool add = false;
  int64_t blocks = 1;

  int64_t panels() const { return panel_count(units, N * L); }  // of a block
  int64_t groups() const { return panel_count(rows, group); }
  // Few rows are divided by units as well.
  int64_t stripes() const { return groups() < 4 ? std::min<int64_t>(4, panels()) : 1; }
  int64_t items() const { return out ? blocks * groups() * stripes() : 0; }
  void run(int64_t item) const {
    const int64_t block = item / (groups() * stripes()), rest = item % (groups() * stripes());
    run(block, rest / stripes() * group, range_of(panels(), rest % stripes(), stripes()));
  }

 private:
  void run(int64_t block, int64_t first, Range part) const {
    const int64_t panel = packed_depth<P>(depth) * N * L, last = std::min(first + group, rows);
    const typename P::packed_t* weights = packed + block * panels() * panel;
    T* to_block = out + block * units;
    int64_t stride = a_stride;
    const typename P::packed_t* from;
    if constexpr (std::is_same_v<A, typename P::packed_t>)
      from = a + first * a_stride + block * depth;
    else
      from = P::pack_rows(a + first * a_stride + block * depth, last - first, depth, stride);
    for (int64_t p = part.begin; p < part.end; ++p)
      for (int64_t row = first; row < last; row += M) {
        const int64_t count = std::min<int64_t>(M, last - row), unit = p * N * L;
        prefetch_tile<P>(to_block + (row + M) * out_stride + unit, std::min<int64_t>(M, last - row - M), out_stride);
        store_tile<P>(count, std::min<int64_t>(N * L, units - unit), bias ? bias + block * units + unit : nullptr, add,
                      to_block + row * out_stride + unit, out_stride, [&](const TileOutput<T>& to) {
                        tile_of<P, N>(count, from + (row - first) * stride, stride, weights + p * panel,
                                      packed_depth<P>(depth), to);
                      });
      }
  }
};

// Rows (rows, units) as panels whose depth is the rows: the right side of RowProducts. With k_pack 1 the rows are used
// where they lie, nothing is packed, and vectors may reach beyond the last unit.
template <ProductTraits P>
struct RowPanels {
  using T = typename P::value_t;
  using packed_t = typename P::packed_t;
  static constexpr int N = bulk_vectors, L = lanes<T>;
  static constexpr bool repacks = P::k_pack > 1;
  int64_t rows, units, row_stride;
  const T* from;
  packed_t* to = nullptr;  // null if not packed
  int64_t blocks = 1;

  int64_t per_block() const { return panel_count(units, N * L); }
  int64_t count() const { return blocks * per_block(); }
  int64_t stride() const { return repacks ? N * L : row_stride; }
  int64_t size() const { return repacks ? count() * panel_size() : 0; }
  const packed_t* panel(int64_t p) const {
    if constexpr (repacks)
      return to + p * panel_size();
    else
      return from + p / per_block() * units + p % per_block() * N * L;
  }

  int64_t items() const { return repacks ? count() : 0; }
  void run(int64_t p) const {
    const int64_t first = p % per_block() * N * L;
    const T* row = from + p / per_block() * units + first;
    packed_t* at = to + p * panel_size();
    for (int64_t k = 0; k < packed_depth<P>(rows) * P::k_pack; k += P::k_pack, row += P::k_pack * row_stride)
      for (int j = 0; j < N; ++j, at += L) {
        const int64_t inside = std::clamp<int64_t>(units - first - j * L, 0, L);
        store(at, pack_row_vector<P>(row + j * L, row_stride, rows - k, static_cast<int>(inside)));
      }
  }

 private:
  int64_t panel_size() const { return packed_depth<P>(rows) * N * L; }
};

// The same from rows that are packed_t already, stored by whoever has them in cache.
template <ProductTraits P>
struct PrepackedPanels {
  using T = typename P::value_t;
  using packed_t = typename P::packed_t;
  static constexpr int N = bulk_vectors, L = lanes<T>;
  static_assert(N == 2 && P::k_pack <= 2);
  int64_t rows, units;
  packed_t* to = nullptr;

  int64_t per_block() const { return panel_count(units, N * L); }  // there is one block
  int64_t count() const { return per_block(); }
  int64_t stride() const { return N * L; }
  int64_t size() const { return count() * panel_size(); }
  const packed_t* panel(int64_t p) const { return to + p * panel_size(); }
  // The rows to store, k_pack at a time; null rows are zeros.
  int64_t packed_rows() const { return packed_depth<P>(rows) * P::k_pack; }
  void store_rows(int64_t p, int64_t k, const packed_t* above, const packed_t* below) const {
    packed_t* at = to + p * panel_size() + k / P::k_pack * N * L;
    Vector<packed_t> first, second;
    P::zip(above, below, first, second);
    store(at, first), store(at + L, second);
  }

 private:
  int64_t panel_size() const { return packed_depth<P>(rows) * N * L; }
};

// Rows (rows, units) as tiles whose depth is the rows: the left side of RowProducts.
template <ProductTraits P>
struct RowTiles {
  using T = typename P::value_t;
  using packed_t = typename P::packed_t;
  static constexpr int M = max_rows<P, bulk_vectors>, L = lanes<T>;
  int64_t rows, units;
  const T* from;
  packed_t* to = nullptr;
  int64_t blocks = 1;

  // The last vector of a row of a tile may reach into the next row, which is written next.
  int64_t tile_size() const { return packed_depth<P>(rows) * M + L; }
  int64_t size() const { return items() * tile_size(); }
  const packed_t* tile(int64_t i) const { return to + i * tile_size(); }

  int64_t per_block() const { return panel_count(units, M); }
  int64_t items() const { return blocks * per_block(); }
  void run(int64_t i) const {
    const int64_t first = i % per_block() * M, row_stride = blocks * units;
    const T* block = from + i / per_block() * units;
    packed_t* at = to + i * tile_size();
    for (int64_t k = 0; k < rows; k += P::k_pack * P::tile_rows, at += P::tile_rows * M)
      for (int64_t m = 0; m < M && first + m < units; m += L) {
        const int inside = static_cast<int>(std::min<int64_t>(L, units - first - m));
        Vector<packed_t> square[P::tile_rows];
        for (int64_t q = 0; q < P::tile_rows; ++q) {
          const int64_t row = k + q * P::k_pack;
          square[q] = pack_row_vector<P>(block + row * row_stride + first + m, row_stride, rows - row, inside);
        }
        P::transpose(square);
        for (int64_t q = 0; q < P::tile_rows; ++q) store(at + m * P::tile_rows + q * L, square[q]);
      }
  }
};

// out (inputs, units) = left (rows, inputs)^T @ right (rows, units) (+ out), for every block of right. Block b is
// multiplied with block b % left.blocks, and its columns of out begin at b * units.
template <ProductTraits P, class Right = RowPanels<P>>
struct RowProducts {
  using T = typename P::value_t;
  using packed_t = typename P::packed_t;
  static constexpr int N = bulk_vectors, L = lanes<T>, M = max_rows<P, N>;
  const RowTiles<P>& left;
  const Right& right;
  T* out;
  int64_t out_stride;
  bool add;

  int64_t items() const { return right.count(); }
  void run(int64_t p) const {
    const int64_t block = p / right.per_block(), in_block = p % right.per_block() * N * L;
    const int64_t unit = block * right.units + in_block, width = std::min<int64_t>(N * L, right.units - in_block);
    const int64_t tiles = left.per_block(), first_tile = block % left.blocks * tiles;
    const packed_t* panel = right.panel(p);
    for (int64_t from = 0; from < right.rows; from += bulk_depth) {
      const int64_t depth = std::min<int64_t>(bulk_depth, right.rows - from), at = from / P::k_pack;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = i * M, inside = std::min<int64_t>(M, left.units - first);
        T* to = out + first * out_stride + unit;
        prefetch_tile<P>(to + M * out_stride, std::min<int64_t>(M, left.units - first - M), out_stride);
        store_tile<P>(inside, width, static_cast<const T*>(nullptr), add || from, to, out_stride,
                      [&](const TileOutput<T>& place) {
                        transposed_tile_of<P, N>(inside, left.tile(first_tile + i) + at * M,
                                                 panel + at * right.stride(), right.stride(), packed_depth<P>(depth),
                                                 place);
                      });
      }
    }
  }
};

// out (units, inputs) = from (inputs, units)^T, rows of `stride`
template <class T>
struct Transpose {
  static constexpr int L = lanes<T>;
  int64_t units, inputs, stride;
  const T* from;
  T* out;

  int64_t items() const { return panel_count(units, L); }
  void run(int64_t item) const {
    const int64_t first = item * L;
    const int inside = static_cast<int>(std::min<int64_t>(L, units - first));
    for (int64_t i = 0; i < inputs; i += L) {
      const int64_t rows = std::min<int64_t>(L, inputs - i);
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int64_t k = 0; k < L; ++k) {
        const T* row = from + (i + k) * stride + first;
        __builtin_prefetch(row + L * stride);  // past the end a prefetch does no harm
        square[k] = k < rows ? load(row, inside) : Vector<T>{};
      }
      transpose<T>(square);
      for (int64_t u = 0; u < inside; ++u) store(out + (first + u) * inputs + i, square[u], static_cast<int>(rows));
    }
  }
};

}  // namespace statefeed
