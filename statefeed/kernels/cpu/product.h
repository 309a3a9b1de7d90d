// The products' inner kernel: rows times packed panels of weights that stay in cache, exact or of bfloat16 pairs.
#pragma once

#include <algorithm>

#include "memory.h"
#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace statefeed {

// How a product multiplies. In: what is packed, `pack` numbers of the depth in each; rows(): a row-major matrix as In.
template <class T>
struct Exact {
  typedef T Out;
  typedef T In;
  static constexpr int pack = 1;
  static Vector<T> multiply_add(Vector<T> sum, Vector<T> x, Vector<T> w) { return sum + x * w; }
  static In join(const T* from, int64_t) { return *from; }
  static const In* rows(const T* from, int64_t, int64_t, int64_t&) { return from; }
  static Vector<T> join(Vector<T> first, Vector<T>) { return first; }
};

#if defined(__AVX512BF16__)
// Two neighbours of the depth rounded to bfloat16, multiplied and summed in float32.
struct Rounded {
  typedef float Out;
  typedef uint32_t In;
  static constexpr int pack = 2;
  static Vector<float> multiply_add(Vector<float> sum, Vector<In> x, Vector<In> w) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  static In round(float value) {  // to nearest even, in the upper half
    In bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static In join(float first, float second) { return (round(first) >> 16) | (round(second) & 0xffff0000u); }
  static In join(const float* from, int64_t left) { return join(from[0], left > 1 ? from[1] : 0.0f); }
  static __m256i halves(Vector<float> value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }
  static Vector<In> join(Vector<float> first, Vector<float> second) {
    return (Vector<In>)_mm512_cvtepu16_epi32(halves(first)) | ((Vector<In>)_mm512_cvtepu16_epi32(halves(second)) << 16);
  }
  static const In* rows(const float* from, int64_t count, int64_t depth, int64_t& stride) {
    const int64_t pairs = (depth + 1) / 2;
    In* to = scratch<In, Use::rounded>(count * pairs);
    for (int64_t i = 0; i < count; ++i) {
      const float* row = from + i * stride;
      int64_t k = 0;
      for (; k + 16 <= depth; k += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * pairs + k / 2), halves(load(row + k)));
      for (; k < depth; k += 2) to[i * pairs + k / 2] = join(row + k, depth - k);
    }
    stride = pairs;
    return to;
  }
};
#endif

// What bfloat16 products are made of: float32's own where this machine has no such instruction.
template <class T>
struct RoundedOf {
  typedef Exact<T> type;
};
#if defined(__AVX512BF16__)
template <>
struct RoundedOf<float> {
  typedef Rounded type;
};
#endif
template <class T>
using RoundedFor = typename RoundedOf<T>::type;

template <class P>
inline int64_t packed_depth(int64_t depth) {
  return (depth + P::pack - 1) / P::pack;
}

template <class T, int N>
constexpr int max_rows = (registers == 32 ? 24 : 12) / N;
template <class T, int N>
constexpr int tile_size = max_rows<T, N> * N * lanes<T>;

inline int64_t panel_count(int64_t units, int64_t width) { return (units + width - 1) / width; }

// out (M rows of N vectors) = a (M rows, depth) @ panel (depth, N vectors); Turned: a is (depth, M). Few rows have too
// few sums to hide the latency of a multiply-add, so the depth is then split over several.
template <class P, int M, int N, bool Turned>
__attribute__((noinline)) void tile(const typename P::In* a, int64_t stride, const typename P::In* panel, int64_t depth,
                                    typename P::Out* out) {
  using T = typename P::Out;
  constexpr int L = lanes<T>, split = M * N >= 8 ? 1 : (M * N >= 4 ? 2 : 4);
  Vector<T> sum[split][M][N] = {};
  int64_t k = 0;
  for (; k + split <= depth; k += split) {
#pragma GCC unroll 4
    for (int s = 0; s < split; ++s) {
      Vector<typename P::In> w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) w[j] = load(panel + (s * N + j) * L);
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const auto x = splat(a[Turned ? s * stride + i : i * stride + s]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[s][i][j] = P::multiply_add(sum[s][i][j], x, w[j]);
      }
    }
    panel += split * N * L;
    a += Turned ? split * stride : split;
  }
  for (; k < depth; ++k, a += Turned ? stride : 1, panel += N * L)
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j)
        sum[0][i][j] = P::multiply_add(sum[0][i][j], splat(a[Turned ? i : i * stride]), load(panel + j * L));
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

template <class P, int N, bool Turned = false, int M = max_rows<typename P::Out, N>>
inline void tile_of(int64_t rows, const typename P::In* a, int64_t stride, const typename P::In* panel, int64_t depth,
                    typename P::Out* out) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<P, N, Turned, M - 1>(rows, a, stride, panel, depth, out);
  }
  tile<P, M, N, Turned>(a, stride, panel, depth, out);
}

template <class P>
int64_t packed_size(int64_t gates, int64_t units, int64_t depth, int vectors) {
  const int64_t width = vectors * lanes<typename P::Out>;
  return panel_count(units, width) * width * gates * packed_depth<P>(depth);
}

// Panels of `vectors` vectors for each of `gates` row blocks of w (gates * units, depth): what `tile` reads, in order.
template <class P, Use U>
const typename P::In* pack_rows(const typename P::Out* w, int64_t gates, int64_t units, int64_t depth, int vectors) {
  const int64_t width = vectors * lanes<typename P::Out>;
  typename P::In* packed = scratch<typename P::In, U>(packed_size<P>(gates, units, depth, vectors));
  typename P::In* to = packed;
  for (int64_t first = 0; first < units; first += width)
    for (int64_t k = 0; k < depth; k += P::pack)
      for (int64_t g = 0; g < gates; ++g)
        for (int64_t u = first; u < first + width; ++u)
          *to++ = u < units ? P::join(w + (g * units + u) * depth + k, depth - k) : typename P::In(0);
  return packed;
}

// Panels of w (depth, units), for the product with w itself.
template <class P, Use U>
const typename P::In* pack_columns(const typename P::Out* w, int64_t units, int64_t depth, int vectors) {
  const int64_t width = vectors * lanes<typename P::Out>;
  typename P::In* packed = scratch<typename P::In, U>(packed_size<P>(1, units, depth, vectors));
  typename P::In* to = packed;
  for (int64_t first = 0; first < units; first += width)
    for (int64_t k = 0; k < depth; k += P::pack)
      for (int64_t u = first; u < first + width; ++u) {
        const typename P::Out pair[2] = {u < units ? w[k * units + u] : 0, u < units && k + 1 < depth ? w[(k + 1) * units + u] : 0};
        *to++ = P::join(pair, 2);
      }
  return packed;
}

}  // namespace statefeed
