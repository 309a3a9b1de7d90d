// Products of rows with packed panels of weights that stay in cache, exact or of bfloat16 pairs.
#pragma once

#include <algorithm>

#include "memory.h"
#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace statefeed {

// How a product multiplies. In: what is packed, `pack` numbers of the depth in each; rows(): a row-major matrix as In;
// sums: vectors of the result that registers hold.
template <class T>
struct Exact {
  typedef T Out;
  typedef T In;
  static constexpr int pack = 1, sums = registers == 32 ? 24 : 12;
  static Vector<T> multiply_add(Vector<T> sum, Vector<T> x, Vector<T> w) { return sum + x * w; }
  static In join(T first, T) { return first; }
  static const In* rows(const T* from, int64_t, int64_t, int64_t&) { return from; }
  static Vector<T> join_vectors(Vector<T> first, Vector<T>) { return first; }
};

#if defined(__AVX512BF16__)
// Two neighbours of the depth rounded to bfloat16, multiplied and summed in float32.
struct Rounded {
  typedef float Out;
  typedef uint32_t In;
  static constexpr int pack = 2, sums = 24;
  static Vector<float> multiply_add(Vector<float> sum, Vector<In> x, Vector<In> w) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  static In round(float value) {  // to nearest even, in the upper half
    In bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static In join(float first, float second) { return (round(first) >> 16) | (round(second) & 0xffff0000u); }
  static __m256i halves(Vector<float> value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }
  static Vector<In> join_vectors(Vector<float> first, Vector<float> second) {
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
      for (; k < depth; k += 2) to[i * pairs + k / 2] = join(row[k], k + 1 < depth ? row[k + 1] : 0.0f);
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

template <class P, int N>
constexpr int max_rows = P::sums / N;
template <class P, int N>
constexpr int tile_size = max_rows<P, N> * N * lanes<typename P::Out>;

inline int64_t panel_count(int64_t units, int64_t width) { return (units + width - 1) / width; }

// out (rows of N vectors, at most max_rows of them) = a (rows, depth) @ panel (depth, N vectors); Turned: a is (depth, rows).
template <class P, int N, bool Turned = false>
void tile_of(int64_t rows, const typename P::In* a, int64_t stride, const typename P::In* panel, int64_t depth,
             typename P::Out* out);

// Weights as panels of `vectors` vectors for each of `gates` row blocks: what `tile_of` reads, in order. A task: a panel
// is an item.
template <class P>
struct Packing {
  typedef typename P::Out T;
  typedef typename P::In In;
  const T* w;      // (gates * units, depth); columns: (depth, units), for the product with w itself
  int64_t gates, units, depth;
  int vectors;
  bool columns;
  In* to;

  int64_t width() const { return vectors * lanes<T>; }
  int64_t items() const { return to ? panel_count(units, width()) : 0; }
  int64_t panel() const { return width() * gates * packed_depth<P>(depth); }
  int64_t size() const { return panel_count(units, width()) * panel(); }

  void run(int64_t item) const {
    const int64_t first = item * width(), inside = std::min(width(), units - first);
    In* at = to + item * panel();
    for (int64_t k = 0; k < depth; k += P::pack)
      for (int64_t g = 0; g < gates; ++g, at += width()) {
        if (columns) {
          const T *row = w + k * units + first, *next = k + 1 < depth ? row + units : nullptr;
          for (int64_t u = 0; u < inside; ++u) at[u] = P::join(row[u], next ? next[u] : T(0));
        } else {
          const T* row = w + (g * units + first) * depth + k;
          for (int64_t u = 0; u < inside; ++u) at[u] = P::join(row[u * depth], k + 1 < depth ? row[u * depth + 1] : T(0));
        }
        std::fill(at + inside, at + width(), In(0));
      }
  }
};

}  // namespace statefeed
