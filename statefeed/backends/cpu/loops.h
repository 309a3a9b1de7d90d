// The loops over time: forward, reverse (feedback or exact) and the sum of Jacobian diagonals, for any cell.
#pragma once

#include <algorithm>

#include "cells.h"
#include "kernels.h"
#include "product.h"
#include "threads.h"

namespace statefeed {

// How a step is divided: by rows nobody waits for anybody; by units every thread keeps its part of the weights in its
// own cache, but all meet after every step.
struct Parts {
  int64_t count;
  bool by_rows;
};

inline Parts parts_of_steps(int64_t ranks, int64_t batch, bool ragged, int64_t tile_rows, int64_t panels, int64_t work) {
  constexpr int64_t worth_a_meeting = 40000;  // multiply-adds a step, about a microsecond
  if (batch >= ranks * tile_rows && !ragged) return {ranks, true};
  const int64_t count = std::min({ranks, panels, work / worth_a_meeting + 1});
  return {count, count == 1};
}

// Flat, like each_vector: what a cell computes stays in registers.
template <class P, class Cell>
[[gnu::flatten]] void forward_step(const Forward<typename P::Out>& s, int64_t offset, const typename P::Out* previous,
                                   Range rows, Range panels) {
  using T = typename P::Out;
  constexpr int L = lanes<T>, U = Cell::unit_vectors, N = Cell::gates * U, M = max_rows<P, N>;
  alignas(64) T sum[tile_size<P, N>];
  const int64_t H = s.hidden, depth = packed_depth<P>(H);
  int64_t stride = H;
  const typename P::In* a = P::rows(previous + rows.begin * H, rows.end - rows.begin, H, stride);
  const auto* packed = static_cast<const typename P::In*>(s.packed);
  const int64_t tiles = panel_count(rows.end - rows.begin, M);
  for (int64_t p = panels.begin; p < panels.end; ++p)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Range part = share(rows.end - rows.begin, tile, tiles);  // even tiles: one of few rows wastes arithmetic
      const int64_t first = rows.begin + part.begin, count = part.end - part.begin;
      tile_of<P, N>(count, a + part.begin * stride, stride, packed + p * depth * N * L, depth, {sum, N * L});
      for (int64_t b = first; b < first + count; ++b)
        for (int u = 0; u < U; ++u) {
          const int64_t unit = (p * U + u) * L, row = offset + b;
          if (unit >= H) break;
          Cell::step({s.gates + row * Cell::gates * H, s.extra ? s.extra + row * H : nullptr, s.y + row * H,
                      s.c ? s.c + b * H : nullptr, previous + b * H, s.bias, sum + ((b - first) * N + u) * L, H, unit,
                      static_cast<int>(std::min<int64_t>(L, H - unit))});
        }
    }
}

template <class P, class Cell>
void forward(Member& member, const Forward<typename P::Out>& s) {
  using T = typename P::Out;
  constexpr int U = Cell::unit_vectors, N = Cell::gates * U;
  const int64_t panels = panel_count(s.hidden, U * lanes<T>);
  const Parts parts = parts_of_steps(member.ranks(), s.batch, s.sizes != nullptr, max_rows<P, N>, panels,
                                     s.batch * Cell::gates * s.hidden * s.hidden / P::speed);
  auto each_step = [&](auto step) {
    const T* previous = s.first_h;
    for (int64_t t = 0, offset = 0; t < s.steps; previous = s.y + offset * s.hidden, offset += s.size(t++))
      step(t, offset, previous);
  };
  if (parts.by_rows)
    member.divide(parts.count, [&](int64_t i) {
      each_step([&](int64_t t, int64_t offset, const T* previous) {
        forward_step<P, Cell>(s, offset, previous, share(s.size(t), i, parts.count), {0, panels});
      });
    });
  else
    each_step([&](int64_t t, int64_t offset, const T* previous) {
      member.divide(parts.count, [&](int64_t i) {
        forward_step<P, Cell>(s, offset, previous, {0, s.size(t)}, share(panels, i, parts.count));
      });
    });
}

template <class T, class Cell, class Visit>
[[gnu::flatten]] void each_vector(const Reverse<T>& s, int64_t t, int64_t offset, Range rows, Range vectors, T* sums,
                                  Visit visit) {
  constexpr int L = lanes<T>;
  constexpr int64_t S = Cell::states;
  const int64_t H = s.hidden;
  const int64_t before = t == 0 ? 0 : offset - s.size(t - 1);
  const T* previous = t == 0 ? s.first_h : s.y + before * H;
  const T* previous_c = t == 0 ? s.first_c : s.extra + before * H;
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const int64_t row = offset + b;
    ReverseRow<T> at{s.gates + row * Cell::gates * H,
                     s.extra + row * H,
                     s.y + row * H,
                     previous + b * H,
                     previous_c + b * H,
                     s.e + row * H,
                     s.diagonal,
                     s.residual ? s.residual + row * S * H : nullptr,
                     s.next_residual ? s.next_residual + row * S * H : nullptr,
                     s.carry + b * S * H,
                     s.d + row * s.d_stride,
                     s.d_hidden + row * s.d_stride,
                     sums,
                     s.rule,
                     H,
                     0,
                     L};
    // Time runs backwards, which no hardware prefetcher follows: ask for what comes some rows later.
    const int64_t later = b + 4, size = s.size(t);
    const int64_t next = (later % size - later / size * size - b) * H;
    for (int64_t v = vectors.begin; v < vectors.end; ++v) {
      for (int g = 0; g < Cell::gates; ++g) __builtin_prefetch(at.gates + next * Cell::gates + g * H + v * L);
      __builtin_prefetch(at.extra + next + v * L);
      __builtin_prefetch(at.e + next + v * L);
      at.unit = v * L;
      at.count = static_cast<int>(std::min<int64_t>(L, H - at.unit));
      visit(at);
    }
  }
}

// carry += d_hidden @ W_hh: what the exact backward does at every step.
template <class T, class Cell>
void add_dense(const Reverse<T>& s, int64_t offset, Range rows, Range panels) {
  constexpr int N = 2, L = lanes<T>, M = max_rows<Exact<T>, N>;
  const int64_t H = s.hidden, stride = Cell::gates * H, depth = Cell::split * H;
  alignas(64) T sum[2][tile_size<Exact<T>, N>];
  for (int64_t p = panels.begin; p < panels.end; ++p)
    for (int64_t first = rows.begin; first < rows.end; first += M) {
      const int64_t count = std::min<int64_t>(M, rows.end - first), row = offset + first;
      const T* panel = s.packed + p * stride * N * L;
      const int64_t unit = p * N * L, width = std::min<int64_t>(N * L, H - unit);
      tile_of<Exact<T>, N>(count, s.d + row * s.d_stride, s.d_stride, panel, depth, {sum[0], N * L});
      if (depth < stride)
        tile_of<Exact<T>, N>(count, s.d_hidden + row * s.d_stride, s.d_stride, panel + depth * N * L, stride - depth,
                             {sum[1], N * L});
      for (int64_t b = 0; b < count; ++b) {
        T* carry = s.carry + (first + b) * Cell::states * H + unit;
        for (int64_t u = 0; u < width; ++u)
          carry[u] += sum[0][b * N * L + u] + (depth < stride ? sum[1][b * N * L + u] : T(0));
      }
    }
}

template <class T, class Cell>
void reverse(Member& member, const Reverse<T>& s) {
  constexpr int N = 2, L = lanes<T>;
  const int64_t H = s.hidden, vectors = panel_count(H, L), panels = panel_count(vectors, N), ranks = member.ranks();
  auto each_step = [&](auto step) {
    int64_t offset = s.rows;
    for (int64_t t = s.steps - 1; t >= 0; --t) step(t, offset -= s.size(t));
  };
  auto local = [&](int64_t t, int64_t offset, Range rows, Range part, int64_t i) {
    each_vector<T, Cell>(s, t, offset, rows, part, s.sums + i * Cell::sums * H,
                         [](const ReverseRow<T>& row) { Cell::reverse(row); });
  };
  Parts parts{ranks, s.batch >= 2 * ranks && !s.sizes};
  if (s.packed)
    parts = parts_of_steps(ranks, s.batch, s.sizes != nullptr, max_rows<Exact<T>, N>, panels, s.batch * Cell::gates * H * H);
  if (parts.by_rows || !s.packed)  // what one part does depends on no other
    member.divide(parts.count, [&](int64_t i) {
      each_step([&](int64_t t, int64_t offset) {
        const Range rows = parts.by_rows ? share(s.size(t), i, parts.count) : Range{0, s.size(t)};
        local(t, offset, rows, parts.by_rows ? Range{0, vectors} : share(vectors, i, parts.count), i);
        if (s.packed) add_dense<T, Cell>(s, offset, rows, {0, panels});
      });
    });
  else
    each_step([&](int64_t t, int64_t offset) {
      const Range all{0, s.size(t)};
      member.divide(parts.count, [&](int64_t i) {
        const Range own = share(panels, i, parts.count);
        local(t, offset, all, {own.begin * N, std::min(own.end * N, vectors)}, i);
      });
      member.divide(parts.count,
                    [&](int64_t i) { add_dense<T, Cell>(s, offset, all, share(panels, i, parts.count)); });
    });
}

// sums (states, hidden) += diag(J[t]) over all rows; `diagonal` holds the diagonals of W_hh.
template <class T, class Cell>
void sum_jacobians(Member& member, const Reverse<T>& s) {
  const int64_t vectors = panel_count(s.hidden, lanes<T>), ranks = std::min(member.ranks(), vectors);
  member.divide(ranks, [&](int64_t i) {
    for (int64_t t = 0, offset = 0; t < s.steps; offset += s.size(t++))
      each_vector<T, Cell>(s, t, offset, {0, s.size(t)}, share(vectors, i, ranks), s.sums, [](const ReverseRow<T>& row) {
        const typename Cell::Local local = Cell::local(row);
        for (int part = 0; part < Cell::states; ++part)
          row.put(row.sums, part, row.at(row.sums, part) + Cell::jacobian(row, local, row.diagonal, part));
      });
  });
}

template <class T, class Cell>
CellKernels<T> cell_kernels() {
  CellKernels<T> kernels{};
  kernels.gates = Cell::gates, kernels.states = Cell::states, kernels.unit_vectors = Cell::unit_vectors;
  kernels.split = Cell::split, kernels.sums = Cell::sums;
  kernels.forward = forward<Exact<T>, Cell>;
  kernels.forward_rounded = forward<RoundedFor<T>, Cell>;
  kernels.reverse = reverse<T, Cell>;
  kernels.sum_jacobians = sum_jacobians<T, Cell>;
  return kernels;
}

}  // namespace statefeed
