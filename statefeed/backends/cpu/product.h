// Products of rows with packed panels of weights that stay in cache, exact or of bfloat16 pairs.
#pragma once

#include <algorithm>

#include "memory.h"
#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace statefeed {

inline int64_t panel_count(int64_t units, int64_t width) { return (units + width - 1) / width; }

// How a product multiplies. In: what is packed, `pack` numbers of the depth in each; side: rows, and Ins of the depth, that
// one instruction takes; sums: vectors of the result that registers hold; speed: products in the time of an exact one.
// rows(): a row-major matrix as In; put_pair(), pair(), put(): two vectors, or one number, of such a row; interleave(): two
// such rows, null: zeros, as two vectors of a panel; turn(): swaps the sides of a square; Held: what a thread holds while it
// multiplies.
template <class T>
struct Exact {
  typedef T Out;
  typedef T In;
  static constexpr int pack = 1, side = 1, sums = registers == 32 ? 24 : 12, speed = 1;
  struct Held {};
  static Vector<T> multiply_add(Vector<T> sum, Vector<T> x, Vector<T> w) { return sum + x * w; }
  static In join(T first, T) { return first; }
  static const In* rows(const T* from, int64_t, int64_t, int64_t&) { return from; }
  static Vector<T> join_vectors(Vector<T> first, Vector<T>) { return first; }
  static void put_pair(In* to, Vector<T> first, Vector<T> second) { store(to, first), store(to + lanes<T>, second); }
  static void pair(const In* from, Vector<T>& first, Vector<T>& second) { first = load(from), second = load(from + lanes<T>); }
  static void put(In* row, int64_t k, T value) { row[k] = value; }
  static void interleave(const In* row, const In*, Vector<In>& first, Vector<In>& second) { pair(row, first, second); }
  static void turn(Vector<In>*) {}
};

#if defined(__AVX512BF16__)
// Two neighbours of the depth rounded to bfloat16, multiplied and summed in float32.
struct Rounded {
  typedef float Out;
  typedef uint32_t In;
  static constexpr int pack = 2, side = 1, sums = 24, speed = 1;
  struct Held {};
  static Vector<float> multiply_add(Vector<float> sum, Vector<In> x, Vector<In> w) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  static In round(float value) {  // to nearest even, in the upper half
    In bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static In join(float first, float second) { return (round(first) >> 16) | (round(second) & 0xffff0000u); }
  static Vector<In> lane() {
    Vector<In> number{};
    for (int i = 0; i < 16; ++i) number[i] = static_cast<In>(i);
    return number;
  }
  static Vector<In> round_vectors(Vector<float> first, Vector<float> second) {  // one after the other
    return (Vector<In>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
  static Vector<In> join_vectors(Vector<float> first, Vector<float> second) {
    const Vector<In> alternate = lane() + ((lane() + 16) << 16);
    return (Vector<In>)_mm512_permutexvar_epi16((__m512i)alternate, (__m512i)round_vectors(first, second));
  }
  static void put_pair(In* to, Vector<float> first, Vector<float> second) { store(to, round_vectors(first, second)); }
  static void pair(const In* from, Vector<float>& first, Vector<float>& second) {
    const __m512i both = (__m512i)load(from);
    first = (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
    second = (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
  }
  static void put(In* row, int64_t k, float value) {
    const uint16_t bits = static_cast<uint16_t>(round(value) >> 16);
    std::memcpy(reinterpret_cast<char*>(row) + 2 * k, &bits, sizeof bits);
  }
  static void interleave(const In* above, const In* below, Vector<In>& first, Vector<In>& second) {
    const __m512i a = above ? (__m512i)load(above) : __m512i{}, b = below ? (__m512i)load(below) : __m512i{};
    const Vector<In> alternate = lane() + ((lane() + 32) << 16);
    first = (Vector<In>)_mm512_permutex2var_epi16(a, (__m512i)alternate, b);
    second = (Vector<In>)_mm512_permutex2var_epi16(a, (__m512i)(alternate + 0x00100010u), b);
  }
  static void round_row(const float* row, int64_t depth, In* to) {
    int64_t k = 0;
    for (; k + 32 <= depth; k += 32) store(to + k / 2, round_vectors(load(row + k), load(row + k + 16)));
    for (; k < depth; k += 2) to[k / 2] = join(row[k], k + 1 < depth ? row[k + 1] : 0.0f);
  }
  static const In* rows(const float* from, int64_t count, int64_t depth, int64_t& stride) {
    const int64_t pairs = (depth + 1) / 2;
    In* to = scratch<In, Use::rounded>(count * pairs);
    for (int64_t i = 0; i < count; ++i) round_row(from + i * stride, depth, to + i * pairs);
    stride = pairs;
    return to;
  }
  static void turn(Vector<In>*) {}
};

#if defined(__AMX_BF16__)
// The same in tiles: 16 rows times 16 pairs of the depth times 16 units in one instruction. Few rows take whole tiles too:
// then it is the weights that are waited for.
struct Tiled : Rounded {
  static constexpr int side = 16, sums = 4 * side, speed = 8;
  class Held {
    struct alignas(64) Shapes {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    static constexpr Shapes all_full{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

   public:
    Held() { _tile_loadconfig(&all_full); }
    ~Held() { _tile_release(); }
    Held(const Held&) = delete;
  };
  // The depth is filled up with zeros; what lies in the rows that the last tile has too many reaches rows that nobody reads.
  static const In* rows(const float* from, int64_t count, int64_t depth, int64_t& stride) {
    const int64_t pairs = (depth + 1) / 2, padded = panel_count(pairs, side) * side;
    const int64_t to_stride = padded + side;  // rows a power of two apart share cache sets
    In* to = scratch<In, Use::rounded>((count + side - 1) * to_stride);
    for (int64_t i = 0; i < count; ++i) {
      round_row(from + i * stride, depth, to + i * to_stride);
      std::fill(to + i * to_stride + pairs, to + i * to_stride + padded, In(0));
    }
    stride = to_stride;
    return to;
  }
  // Swaps the off-diagonal quarters, then those of each quarter, and so on.
  static void turn(Vector<In>* square) {
#pragma GCC unroll 4
    for (In apart = side / 2; apart; apart /= 2) {
      const Vector<In> right = (Vector<In>)((lane() & apart) != 0);
      const Vector<In> upper = lane() + (right & (side - apart)), lower = lane() + ((~right & apart) | (right & side));
#pragma GCC unroll 16
      for (In i = 0; i < side; ++i) {
        if (i & apart) continue;
        const __m512i above = (__m512i)square[i], below = (__m512i)square[i + apart];
        square[i] = (Vector<In>)_mm512_permutex2var_epi32(above, (__m512i)upper, below);
        square[i + apart] = (Vector<In>)_mm512_permutex2var_epi32(above, (__m512i)lower, below);
      }
    }
  }
};
#endif
#endif

// What bfloat16 products are made of: float32's own where this machine has no such instruction.
template <class T>
struct RoundedOf {
  typedef Exact<T> type;
};
#if defined(__AVX512BF16__)
template <>
struct RoundedOf<float> {
#if defined(__AMX_BF16__)
  typedef Tiled type;
#else
  typedef Rounded type;
#endif
};
#endif
template <class T>
using RoundedFor = typename RoundedOf<T>::type;

template <class P>
inline int64_t packed_depth(int64_t depth) {
  return panel_count(depth, P::pack * P::side) * P::side;
}

template <class P, int N>
constexpr int max_rows = P::sums / (N * P::side) * P::side;
template <class P, int N>
constexpr int tile_size = max_rows<P, N> * N * lanes<typename P::Out>;

// Where a tile goes: out = start + product, rows of `stride`; start null is zeros, a start of stride 0 one row for all.
template <class T>
struct Place {
  T* out;
  int64_t stride;
  const T* start = nullptr;
  int64_t start_stride = 0;
};

// out (rows of N vectors) = start + a (rows, depth) @ panel (depth, N vectors); rows up to the next multiple of P::side are
// read and written, too
template <class P, int N>
void tile_of(int64_t rows, const typename P::In* a, int64_t stride, const typename P::In* panel, int64_t depth,
             const Place<typename P::Out>& to);
// The same where the depth runs over rows: a is (depth / side, max_rows, side), `stride` lies between the panel's rows.
template <class P, int N>
void turned_tile_of(int64_t rows, const typename P::In* a, const typename P::In* panel, int64_t stride, int64_t depth,
                    const Place<typename P::Out>& to);

// One vector of a row, joined with the same of the next row where the product takes pairs.
template <class P, class T = typename P::Out>
inline Vector<typename P::In> joined(const T* row, int64_t stride, int64_t rows, int inside) {
  if (P::side > 1 && rows <= 0) return Vector<typename P::In>{};
  return P::join_vectors(load(row, inside), P::pack > 1 && rows > 1 ? load(row + stride, inside) : Vector<T>{});
}

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
          for (int64_t u = 0; u < width(); u += lanes<T>)
            store(at + u, joined<P>(w + k * units + first + u, units, depth - k,
                                    static_cast<int>(std::clamp<int64_t>(inside - u, 0, lanes<T>))));
        } else {
          const T* row = w + (g * units + first) * depth + k;
          for (int64_t u = 0; u < inside; ++u) at[u] = P::join(row[u * depth], k + 1 < depth ? row[u * depth + 1] : T(0));
          std::fill(at + inside, at + width(), In(0));
        }
      }
    std::fill(at, to + (item + 1) * panel(), In(0));
  }
};

}  // namespace statefeed
