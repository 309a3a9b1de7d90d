// Products of rows with packed panels of weights that stay in cache: the tile, and how weights are packed.
#pragma once

#include "traits.h"

namespace statefeed {

// The depth of a panel in packed_t, padded to whole tiles.
template <ProductTraits P>
inline int64_t packed_depth(int64_t depth) {
  return panel_count(depth, P::k_pack * P::tile_rows) * P::tile_rows;
}

// The most rows of N vectors whose sums fit into the registers, in whole tiles.
template <ProductTraits P, int N>
constexpr int max_rows = P::accumulators / (N * P::tile_rows) * P::tile_rows;
template <ProductTraits P, int N>
constexpr int tile_size = max_rows<P, N> * N * lanes<typename P::value_t>;

// out = start + product, both in rows of their stride. A null start is zeros; a start of stride 0 is one row for all.
template <class T>
struct TileOutput {
  T* out;
  int64_t stride;
  const T* start = nullptr;
  int64_t start_stride = 0;
};

// out (rows, N vectors) = start + a (rows, depth) @ panel (depth, N vectors), depth in packed_t. Rows up to the next
// multiple of P::tile_rows are read and written.
template <ProductTraits P, int N>
void tile_of(int64_t rows, const typename P::packed_t* a, int64_t stride, const typename P::packed_t* panel,
             int64_t depth, const TileOutput<typename P::value_t>& to);
// The same for a weight gradient, whose depth runs over rows: a is (depth / tile_rows, max_rows, tile_rows), and
// `stride` lies between the panel's rows.
template <ProductTraits P, int N>
void transposed_tile_of(int64_t rows, const typename P::packed_t* a, const typename P::packed_t* panel, int64_t stride,
                        int64_t depth, const TileOutput<typename P::value_t>& to);

// One vector of a row; with k_pack 2, packed with the same of the next row. `rows` rows are left, `inside` lanes are
// inside.
template <ProductTraits P, class T = typename P::value_t>
inline Vector<typename P::packed_t> pack_row_vector(const T* row, int64_t stride, int64_t rows, int inside) {
  if (P::tile_rows > 1 && rows <= 0) return Vector<typename P::packed_t>{};
  return P::pack2_vectors(load(row, inside), P::k_pack > 1 && rows > 1 ? load(row + stride, inside) : Vector<T>{});
}

// Weights as panels, in the order in which `tile_of` reads them:
//
//   to[panel][k / k_pack][gate][unit of the panel]      a panel is `vectors` vectors wide, its depth
//   packed_depth(depth)
//
// so that one tile has all gates of the same units next to each other. Units beyond the last, and the depth beyond the
// last, are zeros. Weights of several blocks have units and a depth per block, and the panels of one block after those
// of the one before. A task: an item is a panel.
template <ProductTraits P>
struct PackedWeights {
  using T = typename P::value_t;
  using packed_t = typename P::packed_t;
  const T* w;  // (gates, blocks, units, depth); with by_columns (blocks, depth, units), for the product with w itself
  int64_t gates, units, depth;
  int vectors;
  bool by_columns;
  int64_t blocks = 1;
  packed_t* to = nullptr;  // null: nothing to pack

  int64_t width() const { return vectors * lanes<T>; }
  int64_t panels() const { return panel_count(units, width()); }  // of a block
  int64_t items() const { return to ? blocks * panels() : 0; }
  int64_t panel_size() const { return width() * gates * packed_depth<P>(depth); }
  int64_t size() const { return blocks * panels() * panel_size(); }

  void run(int64_t item) const {
    const int64_t first = item % panels() * width();
    packed_t* at = to + item * panel_size();
    by_columns ? pack_columns(item / panels(), first, at) : pack_rows(item / panels(), first, at);
    std::fill(at + panel_count(depth, P::k_pack) * gates * width(), to + (item + 1) * panel_size(), packed_t(0));
  }

 private:
  void pack_columns(int64_t block, int64_t first, packed_t* at) const {
    for (int64_t k = 0; k < depth; k += P::k_pack)
      for (int64_t u = 0; u < width(); u += lanes<T>, at += lanes<T>)
        store(at, pack_row_vector<P>(w + (block * depth + k) * units + first + u, units, depth - k,
                                     static_cast<int>(std::clamp<int64_t>(units - first - u, 0, lanes<T>))));
  }
  void pack_rows(int64_t block, int64_t first, packed_t* at) const {
    constexpr int L = lanes<packed_t>;
    const int64_t packed = panel_count(depth, P::k_pack);
    for (int64_t g = 0; g < gates; ++g)
      for (int64_t u = 0; u < width(); u += L, at += L) {
        const T* row = w + ((g * blocks + block) * units + first + u) * depth;
        const int64_t rows = units - first - u;
        for (int64_t k = 0; k < packed; k += L) {
          Vector<packed_t> square[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i)
            square[i] = i < rows ? P::pack_neighbors(row + i * depth + k * P::k_pack, depth - k * P::k_pack)
                                 : Vector<packed_t>{};
          transpose<packed_t>(square);
          for (int64_t j = 0; j < std::min<int64_t>(L, packed - k); ++j)
            store(at + (k + j) * gates * width(), square[j]);
        }
      }
  }
};

}  // namespace statefeed
