// What the instructions on tiles do, in software: forced in front of the kernels (-include), which it lets run on any
// machine with AVX512-BF16. Where the architecture raises an exception, this stops the program with a sentence.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TDPBF16PS, ...
#pragma once

#define STATEFEED_AMX_MODEL

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// What a test reads: multiplications so far, and threads that hold a configuration.
extern "C" {
inline __attribute__((visibility("default"), used)) std::atomic<int64_t> amx_products{0}, amx_held{0};
}

namespace amx_model {

constexpr int tile_count = 8, most_rows = 16, most_bytes = 64;

inline void rule(bool satisfied, const char* words) {
  if (satisfied) return;
  std::fprintf(stderr, "AMX: %s\n", words);
  std::abort();
}

struct Tile {
  int rows, bytes;
  alignas(64) uint8_t data[most_rows][most_bytes];
};

struct State {
  bool configured = false;
  Tile tiles[tile_count] = {};
};
inline thread_local State state;

inline Tile& tile(int number) {
  rule(state.configured, "a tile is used before the configuration is loaded, or after its release");
  rule(number >= 0 && number < tile_count, "there is no tile of this number");
  rule(state.tiles[number].rows > 0, "a tile is used that the configuration leaves out");
  return state.tiles[number];
}

inline void clear(Tile& t, int from_row = 0) {
  std::memset(t.data[from_row], 0, static_cast<size_t>(most_rows - from_row) * most_bytes);
}

inline void release() {
  if (state.configured) --amx_held;
  state = State{};
}

inline void load_configuration(const void* from) {
  uint8_t at[64];
  std::memcpy(at, from, sizeof at);
  release();
  if (at[0] == 0) return;
  rule(at[0] == 1, "the palette is neither 0 nor 1");
  rule(at[1] == 0, "the first row to go on from is not 0");
  for (int i = 2; i < 16; ++i) rule(at[i] == 0, "a reserved byte of the configuration is not 0");
  for (int i = 0; i < 16; ++i) {
    const int bytes = at[16 + 2 * i] + 256 * at[17 + 2 * i], rows = at[48 + i];
    rule(i < tile_count || (bytes == 0 && rows == 0), "a tile beyond the eighth is configured");
    rule(bytes <= most_bytes && rows <= most_rows, "a tile has more than 16 rows or 64 bytes in a row");
    rule((bytes == 0) == (rows == 0), "a tile has rows but no bytes in a row, or the other way round");
    if (i < tile_count) state.tiles[i].rows = rows, state.tiles[i].bytes = bytes;
  }
  state.configured = true;
  ++amx_held;
}

inline void zero(int number) { clear(tile(number)); }

inline void load(int number, const void* from, int64_t stride) {
  Tile& t = tile(number);
  clear(t);
  for (int i = 0; i < t.rows; ++i)
    std::memcpy(t.data[i], static_cast<const uint8_t*>(from) + i * stride, static_cast<size_t>(t.bytes));
}

inline void store(int number, void* to, int64_t stride) {
  const Tile& t = tile(number);
  for (int i = 0; i < t.rows; ++i)
    std::memcpy(static_cast<uint8_t*>(to) + i * stride, t.data[i], static_cast<size_t>(t.bytes));
}

// Denormals count as zero and become zero, whatever the thread's mode is.
inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline float number(const Tile& t, int row, int at) {  // a bfloat16 is the upper half of a float32
  uint16_t half;
  std::memcpy(&half, t.data[row] + 2 * at, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flushed(value);
}

// Even and odd numbers of the depth are summed apart, every step a fused multiply-add in float32, to nearest even.
inline void multiply_add(int to, int left, int right) {
  Tile &sum = tile(to), &a = tile(left), &b = tile(right);
  rule(to != left && to != right && left != right, "two operands of a multiplication are the same tile");
  rule(sum.bytes % 4 == 0 && a.bytes % 4 == 0 && b.bytes % 4 == 0, "a row of an operand is no multiple of 4 bytes");
  rule(sum.rows == a.rows, "the sum has not the rows of the left side");
  rule(sum.bytes == b.bytes, "the sum has not the columns of the right side");
  rule(a.bytes / 4 == b.rows, "the left side's depth is not the right side's");
  ++amx_products;
  const int depth = b.rows, columns = sum.bytes / 4;
  float rows[2][most_rows][most_rows];  // even and odd numbers of the right side
  for (int k = 0; k < depth; ++k)
    for (int n = 0; n < columns; ++n)
      for (int odd = 0; odd < 2; ++odd) rows[odd][k][n] = number(b, k, 2 * n + odd);
  for (int m = 0; m < sum.rows; ++m) {
    float apart[2][most_rows] = {};
    for (int k = 0; k < depth; ++k)
      for (int odd = 0; odd < 2; ++odd) {
        const float x = number(a, m, 2 * k + odd);
        for (int n = 0; n < columns; ++n) apart[odd][n] = flushed(std::fma(x, rows[odd][k][n], apart[odd][n]));
      }
    float* row = reinterpret_cast<float*>(sum.data[m]);
    for (int n = 0; n < columns; ++n) row[n] = flushed(flushed(row[n]) + flushed(apart[0][n] + apart[1][n]));
  }
  clear(sum, sum.rows);
}

}  // namespace amx_model

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) amx_model::load_configuration(from)
#define _tile_release() amx_model::release()
#define _tile_loadd(tile, from, stride) amx_model::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx_model::store(tile, to, stride)
#define _tile_zero(tile) amx_model::zero(tile)
#define _tile_dpbf16ps(sum, left, right) amx_model::multiply_add(sum, left, right)
