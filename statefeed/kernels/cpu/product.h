// The product of one step: rows of the state times packed weights that stay in cache.
#pragma once

#include "simd.h"

namespace statefeed {

template <class T, int N>
constexpr int max_rows = (registers == 32 ? 24 : 12) / N;

template <class T, int N>
constexpr int tile_size = max_rows<T, N> * N * lanes<T>;

inline int64_t panel_count(int64_t units, int width) { return (units + width - 1) / width; }

// out (M rows of N vectors) = a (M rows, depth) @ panel (depth, N vectors); Turned: a is (depth, M). Few rows have too
// few sums to hide the latency of a multiply-add, so the depth is then split over several.
template <class T, int M, int N, bool Turned>
__attribute__((noinline)) void tile(const T* a, int64_t stride, const T* panel, int64_t depth, T* out) {
  constexpr int L = lanes<T>, split = M * N >= 8 ? 1 : (M * N >= 4 ? 2 : 4);
  Vector<T> sum[split][M][N] = {};
  int64_t k = 0;
  for (; k + split <= depth; k += split) {
#pragma GCC unroll 4
    for (int s = 0; s < split; ++s) {
      Vector<T> b[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) b[j] = load(panel + (s * N + j) * L);
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const Vector<T> x = splat(a[Turned ? s * stride + i : i * stride + s]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[s][i][j] += x * b[j];
      }
    }
    panel += split * N * L;
    a += Turned ? split * stride : split;
  }
  for (; k < depth; ++k, a += Turned ? stride : 1, panel += N * L)
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[0][i][j] += a[Turned ? i : i * stride] * load(panel + j * L);
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      Vector<T> total = sum[0][i][j];
#pragma GCC unroll 4
      for (int s = 1; s < split; ++s) total += sum[s][i][j];
      store(out + (i * N + j) * L, total);
    }
}

template <class T, int N, bool Turned = false, int M = max_rows<T, N>>
inline void tile_of(int64_t rows, const T* a, int64_t stride, const T* panel, int64_t depth, T* out) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<T, N, Turned, M - 1>(rows, a, stride, panel, depth, out);
  }
  tile<T, M, N, Turned>(a, stride, panel, depth, out);
}

// Panels of `vectors` vectors for each of `gates` row blocks of w (gates * units, depth): what `tile` reads, in order.
template <class T>
void pack_rows(const T* w, int64_t gates, int64_t units, int64_t depth, int vectors, T* packed) {
  const int width = vectors * lanes<T>;
  for (int64_t first = 0; first < units; first += width)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t g = 0; g < gates; ++g)
        for (int64_t u = first; u < first + width; ++u) *packed++ = u < units ? w[(g * units + u) * depth + k] : T(0);
}

// Panels of w (depth, units) for the product with w itself, the exact backward's.
template <class T>
void pack_columns(const T* w, int64_t units, int64_t depth, int vectors, T* packed) {
  const int width = vectors * lanes<T>;
  for (int64_t first = 0; first < units; first += width)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t u = first; u < first + width; ++u) *packed++ = u < units ? w[k * units + u] : T(0);
}

}  // namespace statefeed
