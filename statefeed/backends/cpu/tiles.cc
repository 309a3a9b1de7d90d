// The inner kernels of the products: one for every number of rows, compiled once for all cells.
#include "product.h"

namespace statefeed {

namespace {

// Distances in packed_t between two rows of a tile, two steps of its depth, and two rows of the panel.
template <ProductTraits P, int N, bool Transposed>
struct Strides {
  static constexpr int M = max_rows<P, N>, width = N * lanes<typename P::value_t>;
  int64_t stride;  // transposed: of the panel, else of a
  int64_t row() const { return Transposed ? 1 : stride; }
  int64_t depth() const { return Transposed ? M : 1; }
  int64_t panel() const { return Transposed ? stride : width; }
};

// Few rows have too few sums to hide the latency of a multiply-add, so the depth is then split over several.
template <ProductTraits P, int M, int N, bool Transposed>
__attribute__((noinline)) void tile(const typename P::packed_t* a, int64_t stride, const typename P::packed_t* panel,
                                    int64_t depth, const TileOutput<typename P::value_t>& to) {
  using T = typename P::value_t;
  constexpr int L = lanes<T>, split = M * N >= 8 ? 1 : (M * N >= 4 ? 2 : 4);
  constexpr int ahead = 4096 / (N * vector_bytes);  // rows of the panel in 4 KB; past its end a prefetch does no harm
  const Strides<P, N, Transposed> strides{stride};
  Vector<T> sum[split][M][N] = {};
  int64_t k = 0;
  for (; k + split <= depth; k += split) {
#pragma GCC unroll 4
    for (int s = 0; s < split; ++s) {
      Vector<typename P::packed_t> w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        w[j] = load(panel + s * strides.panel() + j * L);
        __builtin_prefetch(panel + (s + ahead) * strides.panel() + j * L);
      }
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const auto x = splat(a[i * strides.row() + s * strides.depth()]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[s][i][j] = P::multiply_add(sum[s][i][j], x, w[j]);
      }
    }
    panel += split * strides.panel();
    a += split * strides.depth();
  }
  for (; k < depth; ++k, a += strides.depth(), panel += strides.panel())
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j)
        sum[0][i][j] = P::multiply_add(sum[0][i][j], splat(a[i * strides.row()]), load(panel + j * L));
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      Vector<T> total = sum[0][i][j];
#pragma GCC unroll 4
      for (int s = 1; s < split; ++s) total += sum[s][i][j];
      if (to.start) total += load(to.start + i * to.start_stride + j * L);
      store(to.out + i * to.stride + j * L, total);
    }
}

template <ProductTraits P, int N, bool Transposed, int M>
  requires(P::tile_rows == 1)
inline void smallest_tile(int64_t rows, const typename P::packed_t* a, int64_t stride,
                          const typename P::packed_t* panel, int64_t depth, const TileOutput<typename P::value_t>& to) {
  if constexpr (M > 1) {
    if (rows < M) return smallest_tile<P, N, Transposed, M - 1>(rows, a, stride, panel, depth, to);
  }
  tile<P, M, N, Transposed>(a, stride, panel, depth, to);
}

#if defined(__AMX_BF16__)
// The tiles' numbers are part of the instructions: 0 to 3 are sums, 4 and 5 rows, 6 and 7 panels. In a translation unit
// of their own, because GCC does not know what a tile's load reads, and would move the stores of a caller past it.
template <int M, int N, bool Transposed>
__attribute__((noinline)) void tile(const uint32_t* a, int64_t stride, const uint32_t* panel, int64_t depth,
                                    const TileOutput<float>& to) {
  static_assert(M * N <= 4 && N >= 2);
  constexpr int side = Amx::tile_rows, bytes = sizeof(float);
  const Strides<Amx, N, Transposed> strides{stride};
  const int64_t row = Transposed ? side : stride, below = side * row, next = side * strides.depth(),
                line = bytes * strides.panel();
  const int64_t out_line = bytes * to.stride, start_line = bytes * to.start_stride;
  constexpr bool below_first = M == 2;  // where sums 2 and 3 lie: below 0 and 1, or after them
  float* out_third = to.out + (below_first ? side * to.stride : 2 * side);
  if (to.start) {
    const float* start_third = to.start + (below_first ? side * to.start_stride : 2 * side);
    _tile_loadd(0, to.start, start_line);
    _tile_loadd(1, to.start + side, start_line);
    if constexpr (M * N > 2) _tile_loadd(2, start_third, start_line);
    if constexpr (M * N > 3) _tile_loadd(3, start_third + side, start_line);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (M * N > 2) _tile_zero(2);
    if constexpr (M * N > 3) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += side, a += next, panel += side * strides.panel()) {
    _tile_loadd(4, a, bytes * row);
    _tile_loadd(6, panel, line);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + side, line);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (M == 2) {
      _tile_loadd(5, a + below, bytes * row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (N > 2) {
      _tile_loadd(6, panel + 2 * side, line);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (N > 3) {
      _tile_loadd(7, panel + 3 * side, line);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, to.out, out_line);
  _tile_stored(1, to.out + side, out_line);
  if constexpr (M * N > 2) _tile_stored(2, out_third, out_line);
  if constexpr (M * N > 3) _tile_stored(3, out_third + side, out_line);
}

template <ProductTraits P, int N, bool Transposed, int M>
  requires(P::tile_rows > 1)
inline void smallest_tile(int64_t rows, const typename P::packed_t* a, int64_t stride,
                          const typename P::packed_t* panel, int64_t depth, const TileOutput<typename P::value_t>& to) {
  rows > P::tile_rows ? tile<M / P::tile_rows, N, Transposed>(a, stride, panel, depth, to)
                      : tile<1, N, Transposed>(a, stride, panel, depth, to);
}
#endif

}  // namespace

template <ProductTraits P, int N>
void tile_of(int64_t rows, const typename P::packed_t* a, int64_t stride, const typename P::packed_t* panel,
             int64_t depth, const TileOutput<typename P::value_t>& to) {
  smallest_tile<P, N, false, max_rows<P, N>>(rows, a, stride, panel, depth, to);
}
template <ProductTraits P, int N>
void transposed_tile_of(int64_t rows, const typename P::packed_t* a, const typename P::packed_t* panel, int64_t stride,
                        int64_t depth, const TileOutput<typename P::value_t>& to) {
  smallest_tile<P, N, true, max_rows<P, N>>(rows, a, stride, panel, depth, to);
}

#define STATEFEED_TILE(P, N)                                                                     \
  template void tile_of<P, N>(int64_t, const P::packed_t*, int64_t, const P::packed_t*, int64_t, \
                              const TileOutput<P::value_t>&);
#define STATEFEED_TILES(P)                                                                                  \
  STATEFEED_TILE(P, 2)                                                                                      \
  STATEFEED_TILE(P, 3)                                                                                      \
  STATEFEED_TILE(P, 4)                                                                                      \
  template void transposed_tile_of<P, 2>(int64_t, const P::packed_t*, const P::packed_t*, int64_t, int64_t, \
                                         const TileOutput<P::value_t>&);

STATEFEED_TILES(Plain<float>)
STATEFEED_TILES(Plain<double>)
#if defined(__AVX512BF16__)
STATEFEED_TILES(Bf16For<float>)
#endif

}  // namespace statefeed
