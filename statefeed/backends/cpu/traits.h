// How a product multiplies: plain numbers, bfloat16 pairs in vectors (AVX512-BF16), or bfloat16 pairs in tiles (AMX).
#pragma once

#include <algorithm>
#include <concepts>

#include "simd.h"
#include "workspace.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace statefeed {

inline int64_t panel_count(int64_t units, int64_t width) { return (units + width - 1) / width; }

// Operands are packed before they are multiplied: k_pack neighbors along the depth (the summed dimension k) share one
// packed_t.
template <class P>
concept ProductTraits =
    requires(typename P::value_t value, Vector<typename P::value_t> values, typename P::packed_t* packed,
             const typename P::packed_t* row, Vector<typename P::packed_t> vector, int64_t& stride,
             const typename P::value_t* from) {
      typename P::value_t;                            // of operands before they are packed, of sums and results
      typename P::packed_t;                           // one element of a packed operand
      typename P::TileConfigGuard;                    // constructed by a thread before products
      { P::k_pack } -> std::convertible_to<int64_t>;  // values of the depth in a packed_t
      {
        P::tile_rows
      } -> std::convertible_to<int64_t>;  // rows, and packed_t along the depth, that one instruction takes
      { P::accumulators } -> std::convertible_to<int>;    // rows times vectors of the result that registers hold
      { P::relative_speed } -> std::convertible_to<int>;  // products in the time of one plain product
      // sum + a * b, element-wise, over all k_pack values
      { P::multiply_add(values, vector, vector) } -> std::same_as<Vector<typename P::value_t>>;
      // rows of `stride` values as rows of packed_t; sets their stride. Throws OutOfMemory.
      { P::pack_rows(from, int64_t{}, int64_t{}, stride) } -> std::same_as<const typename P::packed_t*>;
      // lanes<packed_t> packed neighbors of the depth, of which the second argument says how many values there are
      { P::pack_neighbors(from, int64_t{}) } -> std::same_as<Vector<typename P::packed_t>>;
      // two neighbors of the depth (k_pack 1: the first), lane by lane
      { P::pack2_vectors(values, values) } -> std::same_as<Vector<typename P::packed_t>>;
      P::store_pair(packed, values, values);   // 2 * lanes neighbors of a packed row, as values
      P::load_pair(row, values, values);       // its inverse
      P::store_one(packed, int64_t{}, value);  // value k of a packed row
      P::zip(row, row, vector, vector);  // 2 * lanes columns of two packed rows, as two vectors of a panel; null: zeros
      P::transpose(&vector);             // a square of tile_rows x tile_rows packed_t in place
    };

// float32 or float64 as they are.
template <class T>
struct Plain {
  using value_t = T;
  using packed_t = T;
  static constexpr int k_pack = 1, tile_rows = 1, accumulators = registers == 32 ? 24 : 12, relative_speed = 1;
  struct TileConfigGuard {};
  static Vector<T> multiply_add(Vector<T> sum, Vector<T> x, Vector<T> w) { return sum + x * w; }
  static const packed_t* pack_rows(const T* from, int64_t, int64_t, int64_t&) { return from; }
  static Vector<packed_t> pack_neighbors(const T* from, int64_t inside) {
    return load(from, static_cast<int>(std::min<int64_t>(inside, lanes<T>)));
  }
  static Vector<T> pack2_vectors(Vector<T> first, Vector<T>) { return first; }
  static void store_pair(packed_t* to, Vector<T> first, Vector<T> second) {
    store(to, first), store(to + lanes<T>, second);
  }
  static void load_pair(const packed_t* from, Vector<T>& first, Vector<T>& second) {
    first = load(from), second = load(from + lanes<T>);
  }
  static void store_one(packed_t* row, int64_t k, T value) { row[k] = value; }
  static void zip(const packed_t* row, const packed_t*, Vector<packed_t>& first, Vector<packed_t>& second) {
    load_pair(row, first, second);
  }
  static void transpose(Vector<packed_t>*) {}
};
static_assert(ProductTraits<Plain<float>> && ProductTraits<Plain<double>>);

#if defined(__AVX512BF16__)
// Two neighbors of the depth converted to bfloat16, multiplied and summed in float32.
struct Bf16 {
  using value_t = float;
  using packed_t = uint32_t;
  static constexpr int k_pack = 2, tile_rows = 1, accumulators = 24, relative_speed = 1;
  struct TileConfigGuard {};
  static Vector<float> multiply_add(Vector<float> sum, Vector<packed_t> x, Vector<packed_t> w) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  static packed_t to_bf16(float value) {  // to nearest even, in the upper half
    packed_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static Vector<packed_t> lane() {
    Vector<packed_t> number{};
    for (int i = 0; i < 16; ++i) number[i] = static_cast<packed_t>(i);
    return number;
  }
  static Vector<packed_t> to_bf16(Vector<float> first, Vector<float> second) {  // one after the other
    return (Vector<packed_t>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
  static Vector<packed_t> pack2_vectors(Vector<float> first, Vector<float> second) {
    const Vector<packed_t> alternate = lane() + ((lane() + 16) << 16);
    return (Vector<packed_t>)_mm512_permutexvar_epi16((__m512i)alternate, (__m512i)to_bf16(first, second));
  }
  static void store_pair(packed_t* to, Vector<float> first, Vector<float> second) { store(to, to_bf16(first, second)); }
  static void load_pair(const packed_t* from, Vector<float>& first, Vector<float>& second) {
    const __m512i both = (__m512i)load(from);
    first = (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
    second = (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
  }
  static void store_one(packed_t* row, int64_t k, float value) {
    const uint16_t bits = static_cast<uint16_t>(to_bf16(value) >> 16);
    std::memcpy(reinterpret_cast<char*>(row) + 2 * k, &bits, sizeof bits);
  }
  static void zip(const packed_t* above, const packed_t* below, Vector<packed_t>& first, Vector<packed_t>& second) {
    const __m512i a = above ? (__m512i)load(above) : __m512i{}, b = below ? (__m512i)load(below) : __m512i{};
    const Vector<packed_t> alternate = lane() + ((lane() + 32) << 16);
    first = (Vector<packed_t>)_mm512_permutex2var_epi16(a, (__m512i)alternate, b);
    second = (Vector<packed_t>)_mm512_permutex2var_epi16(a, (__m512i)(alternate + 0x00100010u), b);
  }
  static Vector<packed_t> pack_neighbors(const float* from, int64_t inside) {
    if (inside <= 16) return to_bf16(load(from, static_cast<int>(inside)), Vector<float>{});
    return to_bf16(load(from), load(from + 16, static_cast<int>(std::min<int64_t>(inside - 16, 16))));
  }
  static void pack_row(const float* row, int64_t depth, packed_t* to) {
    for (int64_t k = 0; k < depth; k += 32)
      store(to + k / 2, pack_neighbors(row + k, depth - k),
            static_cast<int>(std::min<int64_t>((depth - k + 1) / 2, 16)));
  }
  static const packed_t* pack_rows(const float* from, int64_t count, int64_t depth, int64_t& stride) {
    const int64_t pairs = (depth + 1) / 2;
    packed_t* to = workspace<packed_t, Tag::packed_rows>(count * pairs);
    for (int64_t i = 0; i < count; ++i) pack_row(from + i * stride, depth, to + i * pairs);
    stride = pairs;
    return to;
  }
  static void transpose(Vector<packed_t>*) {}
};
static_assert(ProductTraits<Bf16>);

#if defined(__AMX_BF16__)
// The same in tiles: 16 rows times 16 pairs of the depth times 16 units in one instruction. Few rows take whole tiles
// too: reading the weights is then the limit, not the arithmetic.
struct Amx : Bf16 {
  static constexpr int tile_rows = 16, accumulators = 4 * tile_rows, relative_speed = 8;
  // Configures all eight tiles as 16 rows of 64 bytes, and releases them.
  class TileConfigGuard {
    struct alignas(64) Shapes {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    static constexpr Shapes full{.palette = 1,
                                 .start_row = 0,
                                 .reserved = {},
                                 .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                 .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

   public:
    TileConfigGuard() { _tile_loadconfig(&full); }
    ~TileConfigGuard() { _tile_release(); }
    TileConfigGuard(const TileConfigGuard&) = delete;
  };
  // The depth is padded with zeros. The last tile may have rows beyond `count`: their contents reach only rows of the
  // result that nobody reads.
  static const packed_t* pack_rows(const float* from, int64_t count, int64_t depth, int64_t& stride) {
    const int64_t pairs = (depth + 1) / 2, padded = panel_count(pairs, tile_rows) * tile_rows;
    const int64_t to_stride = padded + tile_rows;  // rows a power of two apart share cache sets
    packed_t* to = workspace<packed_t, Tag::packed_rows>((count + tile_rows - 1) * to_stride);
    for (int64_t i = 0; i < count; ++i) {
      pack_row(from + i * stride, depth, to + i * to_stride);
      std::fill(to + i * to_stride + pairs, to + i * to_stride + padded, packed_t(0));
    }
    stride = to_stride;
    return to;
  }
  static void transpose(Vector<packed_t>* square) { statefeed::transpose<packed_t>(square); }
};
static_assert(ProductTraits<Amx>);
#endif
#endif

// What bfloat16 products of float32 operands use: plain float32 where this machine has no such instruction.
template <class T>
struct Bf16Of {
  using type = Plain<T>;
};
#if defined(__AVX512BF16__)
template <>
struct Bf16Of<float> {
#if defined(__AMX_BF16__)
  using type = Amx;
#else
  using type = Bf16;
#endif
};
#endif
template <class T>
using Bf16For = typename Bf16Of<T>::type;

}  // namespace statefeed
