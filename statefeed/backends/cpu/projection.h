// The output projection of a cell, h = u W_hr^T with h (output) and u (hidden): its steps forward and backward.
//
// forward    every step ends with the product u W_hr^T
// backward   delta = grad_y + carry is a scan of its own, because under a diagonal nothing leads from c of a step to h
//            of the step before; the gradient of u is delta W_hr, and the cell takes it in place of that of h
#pragma once

#include <algorithm>

#include "cell.h"
#include "product.h"
#include "threads.h"

namespace statefeed {

constexpr int projection_vectors = 2;

// out (rows, columns) = a (rows, depth) @ panels, only these panels, through a copy of whole tiles.
template <ProductTraits P, class T = typename P::value_t>
void product_of_step(Range rows, Range panels, const typename P::packed_t* a, int64_t a_stride,
                     const typename P::packed_t* packed, int64_t depth, T* out, int64_t columns) {
  constexpr int N = projection_vectors, M = max_rows<P, N>;
  constexpr int64_t width = N * lanes<T>;
  alignas(64) T sum[tile_size<P, N>];
  const int64_t tiles = panel_count(rows.end - rows.begin, M);
  for (int64_t p = panels.begin; p < panels.end; ++p)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Range part = range_of(rows.end - rows.begin, tile, tiles);
      const int64_t count = part.end - part.begin, inside = std::min(width, columns - p * width);
      tile_of<P, N>(count, a + part.begin * a_stride, a_stride, packed + p * depth * width, depth,
                    {.out = sum, .stride = width});
      for (int64_t b = 0; b < count; ++b)
        std::copy_n(sum + b * width, inside, out + (rows.begin + part.begin + b) * columns + p * width);
    }
}

// y of a step = u W_hr^T
template <ProductTraits P, class T = typename P::value_t>
void project(const ForwardArgs<T>& s, int64_t offset, Range rows, Range panels) {
  const int64_t H = s.range.hidden, O = s.range.output;
  int64_t stride = H;
  const auto* a = P::pack_rows(s.unprojected + rows.begin * H, rows.end - rows.begin, H, stride);
  product_of_step<P>(rows, panels, a, stride, static_cast<const typename P::packed_t*>(s.packed_w_hr),
                     packed_depth<P>(H), s.y + offset * O, O);
}

// delta of a step, and what it passes to the step before through D of h.
template <class T, class Cell>
void reverse_output_step(const ReverseArgs<T>& s, int64_t offset, Range rows, Range vectors) {
  constexpr int L = lanes<T>;
  const int64_t O = s.range.output, S = O + (Cell::states - 1) * s.range.hidden;
  const bool own_diagonal = s.rule == Rule::jacobian;
  const T* D = own_diagonal ? s.output_diagonal : s.diagonal;
  const int64_t D_stride = own_diagonal ? O : s.diagonal_stride;
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const int64_t row = offset + b;
    for (int64_t unit = vectors.begin * L; unit < std::min(vectors.end * L, O); unit += L) {
      const int count = static_cast<int>(std::min<int64_t>(L, O - unit));
      T* carry = s.carry + b * S + unit;
      const Vector<T> delta = load(s.grad_y + row * O + unit, count) + load(carry, count);
      Vector<T> passed = D ? load(D + row * D_stride + unit, count) * delta : Vector<T>{};
      store(s.delta + row * O + unit, delta, count);
      const Vector<T> remaining = -passed;
      if (s.residual) passed += load(s.residual + row * S + unit, count);
      if (s.next_residual) store(s.next_residual + row * S + unit, remaining, count);
      store(carry, passed, count);
    }
  }
}

template <class T, class Visit>
void each_step_reversed(const StepRange& range, Visit visit) {
  int64_t offset = range.rows;
  for (int64_t t = range.steps - 1; t >= 0; --t) visit(t, offset -= range.size(t));
}

// delta of every step under a rule with a diagonal.
template <class T, class Cell>
void reverse_output(Worker& worker, const ReverseArgs<T>& s) {
  const StepRange& range = s.range;
  const int64_t vectors = panel_count(range.output, lanes<T>), ranks = worker.ranks();
  const bool by_rows = range.batch >= 2 * ranks && !range.batch_sizes;
  worker.parallel_for(ranks, [&](int64_t i) {
    each_step_reversed<T>(range, [&](int64_t t, int64_t offset) {
      const Range all{.begin = 0, .end = range.size(t)}, every{.begin = 0, .end = vectors};
      reverse_output_step<T, Cell>(s, offset, by_rows ? range_of(range.size(t), i, ranks) : all,
                                   by_rows ? every : range_of(vectors, i, ranks));
    });
  });
}

// The gradient of u in a step, delta W_hr; in float32, as all steps of the exact rule.
template <class T>
void unproject(const ReverseArgs<T>& s, int64_t offset, Range rows, Range panels) {
  const int64_t O = s.range.output, H = s.range.hidden;
  product_of_step<Plain<T>>(rows, panels, s.delta + (offset + rows.begin) * O, O, s.packed_w_hr, O,
                            s.grad_unprojected + offset * H, H);
}

}  // namespace statefeed
