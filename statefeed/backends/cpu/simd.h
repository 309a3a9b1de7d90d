// Vectors of the widest register, and functions of them: exp, sigmoid, its logarithm and tanh, accurate to a few units
// in the last place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace statefeed {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, registers = 32;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, registers = 32;
#else
constexpr int vector_bytes = 16, registers = 16;
#endif

template <class T>
struct Format;
template <>
struct Format<float> {
  typedef uint32_t Bits;
  static constexpr int mantissa = 23, bias = 127, degree = 7, log_terms = 7;
  static constexpr float round = 12582912.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
  static constexpr float exp_limit = 87.0f;
};
template <>
struct Format<double> {
  typedef uint64_t Bits;
  static constexpr int mantissa = 52, bias = 1023, degree = 13, log_terms = 16;
  static constexpr double round = 6755399441055744.0, ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723e-6;
  static constexpr double exp_limit = 708.0;
};

template <class T>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
  typedef T unaligned __attribute__((vector_size(vector_bytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
inline Vector<T> splat(T value) {
  return value - Vector<T>{};
}

template <class T>
inline Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

template <class T>
inline void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}

// The last vector of a row may be partly outside it: `count` lanes are inside.
template <class T>
inline Vector<T> load(const T* from, int count) {
  if (__builtin_expect(count == lanes<T>, 1)) return load(from);
  Vector<T> value{};
  std::memcpy(&value, from, sizeof(T) * static_cast<size_t>(count));
  return value;
}

template <class T>
inline void store(T* to, Vector<T> value, int count) {
  if (__builtin_expect(count == lanes<T>, 1)) return store(to, value);
  std::memcpy(to, &value, sizeof(T) * static_cast<size_t>(count));
}

// Lanes of a, counted from 0, and of b, counted from lanes<T>.
template <class T, size_t... lane>
inline Vector<T> shuffle(Vector<T> a, Vector<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return __builtin_shuffle(a, b, Vector<Index>{lane...});
#endif
}

// Swaps the lanes of `upper` with a set bit `apart` and those of `lower` without it.
template <class T, size_t apart, size_t... i>
inline void exchange(Vector<T>& upper, Vector<T>& lower, std::index_sequence<i...>) {
  const Vector<T> above = upper;
  upper = shuffle<T, (i & apart ? lanes<T> + i - apart : i)...>(above, lower);
  lower = shuffle<T, (i & apart ? lanes<T> + i : i + apart)...>(above, lower);
}

// A square of lanes<T> rows in place: swaps its off-diagonal quarters, then those of each quarter, and so on.
template <class T, size_t apart = lanes<T> / 2>
inline void transpose(Vector<T>* square) {
#pragma GCC unroll 16
  for (size_t i = 0; i < lanes<T>; ++i)
    if (!(i & apart)) exchange<T, apart>(square[i], square[i + apart], std::make_index_sequence<lanes<T>>());
  if constexpr (apart > 1) transpose<T, apart / 2>(square);
}

constexpr double reciprocal_factorial(int k) { return k < 2 ? 1.0 : reciprocal_factorial(k - 1) / k; }

// sum over j from K to Format<T>::degree of r^(j-K) / j!, in halves that do not wait for each other. `powers` are r,
// r^2, r^4, ...
template <class T, int K, int terms = Format<T>::degree - K + 1>
inline Vector<T> taylor(const Vector<T>* powers) {
  if constexpr (terms == 1) {
    return splat(static_cast<T>(reciprocal_factorial(K)));
  } else {
    constexpr int half = terms > 8   ? 8
                         : terms > 4 ? 4
                         : terms > 2 ? 2
                                     : 1,
                  power = half > 4   ? 3
                          : half > 2 ? 2
                                     : half / 2;
    return taylor<T, K, half>(powers) + powers[power] * taylor<T, K + half, terms - half>(powers);
  }
}

// min(max(x, -limit), limit), and NaN stays NaN.
template <class T>
inline Vector<T> clamp(Vector<T> x, T limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm512_max_ps(_mm512_set1_ps(-limit), _mm512_min_ps(_mm512_set1_ps(limit), (__m512)x));
  else
    return (Vector<T>)_mm512_max_pd(_mm512_set1_pd(-limit), _mm512_min_pd(_mm512_set1_pd(limit), (__m512d)x));
#else
  const Vector<T> high = splat(limit), low = splat(-limit);
  x = high < x ? high : x;
  return low > x ? low : x;
#endif
}

// exp(x) = power * (1 + fraction); x is clamped where power would leave the normal numbers, and NaN stays NaN.
template <class T>
inline void split_exp(Vector<T> x, Vector<T>& power, Vector<T>& fraction) {
  using F = Format<T>;
  typedef typename F::Bits Bits __attribute__((vector_size(vector_bytes)));
  x = clamp<T>(x, F::exp_limit);
  const Vector<T> shifted = x * static_cast<T>(1.4426950408889634074) + F::round;
  const Vector<T> n = shifted - F::round;
  const Vector<T> r = (x - n * F::ln2_high) - n * F::ln2_low;
  const typename F::Bits one = static_cast<typename F::Bits>(F::bias) << F::mantissa;
  power = (Vector<T>)(((Bits)shifted << F::mantissa) + one);
  Vector<T> powers[4] = {r, r * r};
  powers[2] = powers[1] * powers[1];
  powers[3] = powers[2] * powers[2];  // for double only
  fraction = r + powers[1] * taylor<T, 2>(powers);
}

template <class T>
inline Vector<T> exp(Vector<T> x) {
  Vector<T> power, fraction;
  split_exp<T>(x, power, fraction);
  return power + power * fraction;
}

template <class T>
inline Vector<T> sigmoid(Vector<T> x) {
  Vector<T> power, fraction;
  split_exp<T>(-x, power, fraction);
  return static_cast<T>(1) / (static_cast<T>(1) + power + power * fraction);
}

template <class T, int K>
inline Vector<T> log_series(Vector<T> square) {  // sum over j >= K of square^(j-K) / (2j + 1)
  if constexpr (K + 1 == Format<T>::log_terms)
    return splat(static_cast<T>(1.0 / (2 * K + 1)));
  else
    return static_cast<T>(1.0 / (2 * K + 1)) + square * log_series<T, K + 1>(square);
}

// min(x, 0) - log(1 + u) with u = exp(-|x|), and log(1 + u) = 2 (s + s^3 / 3 + s^5 / 5 + ...) with s = u / (2 + u), at
// most 1/3. `slope` becomes its derivative, sigmoid(-x).
template <class T>
inline Vector<T> log_sigmoid(Vector<T> x, Vector<T>& slope) {
  const Vector<T> zero{}, one = splat(T(1)), u = exp<T>(x < zero ? x : -x), s = u / (u + T(2));
  slope = (x < zero ? one : u) / (one + u);
  return (x < zero ? x : zero) - (s + s) * log_series<T, 0>(s * s);
}

// Through exp(2x) - 1, so that small arguments keep their relative accuracy.
template <class T>
inline Vector<T> tanh(Vector<T> x) {
  Vector<T> power, fraction;
  x = clamp<T>(x, 20);
  split_exp<T>(x + x, power, fraction);
  const Vector<T> minus_one = power * fraction + (power - static_cast<T>(1));
  return minus_one / (minus_one + static_cast<T>(2));
}

}  // namespace statefeed
