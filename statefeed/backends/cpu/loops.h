// The loops over time for any cell: forward, reverse (feedback or exact), and the sum of Jacobian diagonals.
#pragma once

#include <algorithm>

#include "cell.h"
#include "cells/table.h"
#include "product.h"
#include "projection.h"
#include "threads.h"

namespace statefeed {

// How the work of a step is divided among `count` threads. By rows, no thread waits for another between steps; by
// units, every thread has its part of W_hh in its own cache, but all meet after every step.
struct Partition {
  int64_t count;
  bool by_rows;
};

struct StepWork {
  int64_t tile_rows, panels, multiply_adds;  // rows of a tile; panels of W_hh; of a whole step
};

inline Partition partition_of_step(int64_t ranks, const StepRange& range, const StepWork& work) {
  // 0.3 to 0.8 microseconds of one core at 50 to 120 billion multiply-adds a second (float32). Two running threads on a
  // Zen 5 meet in 0.1 microseconds (measured with loops of two empty items), and each must fetch what the other wrote.
  constexpr int64_t min_work_per_barrier = 40000;
  if (range.batch >= ranks * work.tile_rows && !range.batch_sizes) return {.count = ranks, .by_rows = true};
  const int64_t count = std::min({ranks, work.panels, work.multiply_adds / min_work_per_barrier + 1});
  return {.count = count, .by_rows = count == 1};
}

// A row of an array, or null if the array is null: arithmetic on a null pointer is undefined behavior.
template <class T>
inline T* row_of(T* array, int64_t offset) {
  return array ? array + offset : nullptr;
}

// Flattened, like `each_vector`: what a cell computes stays in registers.
template <ProductTraits P, class Cell>
[[gnu::flatten]] void forward_step(const ForwardArgs<typename P::value_t>& s, int64_t offset,
                                   const typename P::value_t* previous_h, Range rows, Range panels) {
  using T = typename P::value_t;
  using packed_t = typename P::packed_t;
  constexpr int L = lanes<T>, U = Cell::unit_vectors, N = Cell::gates * U, M = max_rows<P, N>;
  constexpr int64_t parts_of_c = Cell::states + Cell::constant_states - 1;
  alignas(64) T sum[tile_size<P, N>];
  const int64_t H = s.range.hidden, O = s.range.output, width = H / s.heads;
  const int64_t columns = O / s.heads, depth = packed_depth<P>(columns);  // of W_hh
  const int64_t head_panels = panel_count(width, U * L), tiles = panel_count(rows.end - rows.begin, M);
  const auto* packed = static_cast<const packed_t*>(s.packed_w_hh);
  for (int64_t head = panels.begin / head_panels; head * head_panels < panels.end; ++head) {
    const int64_t first_panel = head * head_panels, end_unit = (head + 1) * width;
    int64_t stride = O;
    const packed_t* a =
        P::pack_rows(previous_h + rows.begin * O + head * columns, rows.end - rows.begin, columns, stride);
    for (int64_t p = std::max(panels.begin, first_panel); p < std::min(panels.end, first_panel + head_panels); ++p)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        // Tiles of even size: one of few rows would waste arithmetic.
        const Range part = range_of(rows.end - rows.begin, tile, tiles);
        const int64_t first = rows.begin + part.begin, count = part.end - part.begin;
        const int64_t first_unit = head * width + (p - first_panel) * U * L;
        tile_of<P, N>(count, a + part.begin * stride, stride, packed + p * depth * N * L, depth,
                      {.out = sum, .stride = N * L});
        for (int64_t b = first; b < first + count; ++b)
          for (int u = 0; u < U; ++u) {
            const int64_t unit = first_unit + u * L, row = offset + b;
            if (u && unit >= end_unit) break;
            Cell::step({.gates = s.gates + row * Cell::gates * H,
                        .aux = row_of(s.aux, row * Cell::aux_parts * H),
                        .y = Cell::projects ? s.unprojected + b * H : s.y + row * O,
                        .c = row_of(s.c, b * parts_of_c * H),
                        .previous_h = previous_h + b * O,
                        .hidden_bias = s.hidden_bias,
                        .product = sum + ((b - first) * N + u) * L,
                        .hidden = H,
                        .unit = unit,
                        .count = static_cast<int>(std::min<int64_t>(L, end_unit - unit))});
          }
      }
  }
}

template <ProductTraits P, class Cell>
void forward(Worker& worker, const ForwardArgs<typename P::value_t>& s) {
  using T = typename P::value_t;
  constexpr int U = Cell::unit_vectors, N = Cell::gates * U;
  const StepRange& range = s.range;
  const int64_t H = range.hidden, O = range.output;
  const int64_t panels = s.heads * panel_count(H / s.heads, U * lanes<T>);
  const int64_t output_panels = Cell::projects ? panel_count(O, projection_vectors * lanes<T>) : 0;
  const int64_t multiply_adds = range.batch * H * (Cell::gates * O / s.heads + (Cell::projects ? O : 0));
  const Partition partition = partition_of_step(
      worker.ranks(), range,
      {.tile_rows = max_rows<P, N>, .panels = panels, .multiply_adds = multiply_adds / P::relative_speed});
  auto each_step = [&](auto step) {
    const T* previous_h = s.first_h;
    for (int64_t t = 0, offset = 0; t < range.steps; previous_h = s.y + offset * O, offset += range.size(t++))
      step(t, offset, previous_h);
  };
  if (partition.by_rows)
    worker.parallel_for(partition.count, [&](int64_t i) {
      each_step([&](int64_t t, int64_t offset, const T* previous_h) {
        const Range rows = range_of(range.size(t), i, partition.count);
        forward_step<P, Cell>(s, offset, previous_h, rows, {.begin = 0, .end = panels});
        if constexpr (Cell::projects) project<P>(s, offset, rows, {.begin = 0, .end = output_panels});
      });
    });
  else
    each_step([&](int64_t t, int64_t offset, const T* previous_h) {
      const Range all{.begin = 0, .end = range.size(t)};
      worker.parallel_for(partition.count, [&](int64_t i) {
        forward_step<P, Cell>(s, offset, previous_h, all, range_of(panels, i, partition.count));
      });
      if constexpr (Cell::projects)
        worker.parallel_for(partition.count, [&](int64_t i) {
          project<P>(s, offset, all, range_of(output_panels, i, partition.count));
        });
    });
}

template <class T, class Cell, class Visit>
[[gnu::flatten]] void each_vector(const ReverseArgs<T>& s, int64_t t, int64_t offset, Range rows, Range vectors,
                                  Visit visit) {
  constexpr int L = lanes<T>;
  constexpr int64_t A = Cell::aux_parts;
  const int64_t H = s.range.hidden, O = s.range.output, S = O + (Cell::states - 1) * H;
  const int64_t before = t == 0 ? 0 : offset - s.range.size(t - 1);
  const T* previous_h = t == 0 ? s.first_h : s.y + before * O;
  const T* previous_c = t == 0 ? s.first_c : row_of(s.aux, before * A * H);
  const int64_t previous_c_stride = t == 0 ? s.first_c_stride : A * H;
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const int64_t row = offset + b;
    // Pointers are null if the cell, the rule or the pass has no such array.
    ReverseRow<T> at{.gates = s.gates + row * Cell::gates * H,
                     .aux = row_of(s.aux, row * A * H),
                     .y = s.y + row * O,
                     .previous_h = previous_h + b * O,
                     .previous_c = row_of(previous_c, b * previous_c_stride),
                     .grad_y = row_of(Cell::projects ? s.grad_unprojected : s.grad_y, row * H),
                     .diagonal = row_of(s.diagonal, row * s.diagonal_stride),
                     .w_hh_diag = s.w_hh_diag,
                     .residual = row_of(s.residual, row * S),
                     .next_residual = row_of(s.next_residual, row * S),
                     .carry = row_of(s.carry, b * S),
                     .gate_grads = row_of(s.gate_grads, row * s.gate_grad_stride),
                     .separate_grads = row_of(s.separate_grads, row * s.gate_grad_stride),
                     .sums = s.sums,
                     .unprojected = row_of(s.unprojected, row * H),
                     .rule = s.rule,
                     .hidden = H,
                     .output = O,
                     .unit = 0,
                     .count = L};
    // Time runs backward, which hardware prefetchers do not follow, so each row prefetches the row that the loop visits
    // `ahead` rows later. Within the step this is row b + ahead. After the end of the step it is a row of an earlier
    // step, which is before this one in memory: with b + ahead = q * size + r it is row r of the step q steps earlier,
    // r - q * size rows from the first row of this step, and r - q * size - b rows from this row. At the beginning of
    // the sequence the address may be before the array; a prefetch of it has no effect.
    constexpr int64_t ahead = 4;
    const int64_t later = b + ahead, size = s.range.size(t);
    const int64_t next = (later % size - later / size * size - b) * H;
    for (int64_t v = vectors.begin; v < vectors.end; ++v) {
      for (int g = 0; g < Cell::gates; ++g) __builtin_prefetch(at.gates + next * Cell::gates + g * H + v * L);
      for (int i = 0; i < A; ++i) __builtin_prefetch(at.aux + next * A + i * H + v * L);
      if (at.grad_y) __builtin_prefetch(at.grad_y + next + v * L);
      at.unit = v * L;
      at.count = static_cast<int>(std::min<int64_t>(L, H - at.unit));
      visit(at);
    }
  }
}

// carry += (gate_grads of the hidden side) @ W_hh: what the exact backward pass does at every step.
template <class T, class Cell>
void add_dense_product(const ReverseArgs<T>& s, int64_t offset, Range rows, Range panels) {
  using P = Plain<T>;
  constexpr int N = 2, L = lanes<T>, M = max_rows<P, N>;
  const int64_t H = s.range.hidden, O = s.range.output, S = O + (Cell::states - 1) * H;
  const int64_t depth = Cell::shared_gates * H, separate_depth = Cell::gates * H - depth;
  // With several heads, the gradients of one head are a part of every gate's, and each part is a product of its own.
  const int64_t heads = s.heads, head_units = O / heads, head_panels = panel_count(head_units, N * L);
  const int64_t parts = heads == 1 ? 1 : Cell::gates, part_depth = depth / (parts * heads);
  const int64_t panel_size = Cell::gates * H / (parts * heads) * N * L;
  alignas(64) T sum[2][tile_size<P, N>];
  for (int64_t p = panels.begin; p < panels.end; ++p)
    for (int64_t first = rows.begin; first < rows.end; first += M) {
      const int64_t count = std::min<int64_t>(M, rows.end - first), row = offset + first;
      const int64_t head_unit = p / head_panels * head_units, in_head = p % head_panels * N * L;
      const int64_t unit = head_unit + in_head, width = std::min<int64_t>(N * L, head_units - in_head);
      const T* panel = s.packed_w_hh + p * panel_size;
      const T* grads = s.gate_grads + row * s.gate_grad_stride + head_unit;
      for (int64_t i = 0; i < parts; ++i)
        tile_of<P, N>(count, grads + i * H, s.gate_grad_stride, panel + i * heads * head_panels * panel_size,
                      part_depth,
                      {.out = sum[0], .stride = N * L, .start = i ? sum[0] : nullptr, .start_stride = N * L});
      if (separate_depth)
        tile_of<P, N>(count, s.separate_grads + row * s.gate_grad_stride, s.gate_grad_stride, panel + depth * N * L,
                      separate_depth, {.out = sum[1], .stride = N * L});
      for (int64_t b = 0; b < count; ++b) {
        T* carry = s.carry + (first + b) * S + unit;
        for (int64_t u = 0; u < width; ++u)
          carry[u] += sum[0][b * N * L + u] + (separate_depth ? sum[1][b * N * L + u] : T(0));
      }
    }
}

template <class T, class Cell>
void reverse(Worker& worker, const ReverseArgs<T>& s) {
  constexpr int N = 2, L = lanes<T>;
  static_assert(N == projection_vectors);
  const StepRange& range = s.range;
  const int64_t H = range.hidden, O = range.output, vectors = panel_count(H, L), ranks = worker.ranks();
  const int64_t pairs = panel_count(vectors, N), panels = s.heads * panel_count(O / s.heads, N * L);
  auto local = [&](int64_t t, int64_t offset, Range rows, Range part) {
    each_vector<T, Cell>(s, t, offset, rows, part, [](const ReverseRow<T>& row) { Cell::reverse(row); });
  };
  const bool exact = s.rule == Rule::exact;
  const int64_t multiply_adds = range.batch * H * (Cell::gates * O / s.heads + (Cell::projects ? O : 0));
  Partition partition{.count = ranks, .by_rows = range.batch >= 2 * ranks && !range.batch_sizes};
  if (exact)
    partition = partition_of_step(
        ranks, range, {.tile_rows = max_rows<Plain<T>, N>, .panels = panels, .multiply_adds = multiply_adds});
  // With a projection the exact rule computes the gradients of h and u step by step, before those of the gates.
  auto output_step = [&](int64_t offset, Range rows, Range part) {
    if constexpr (Cell::projects)
      reverse_output_step<T, Cell>(s, offset, rows, {.begin = part.begin * N, .end = part.end * N});
  };
  auto unproject_step = [&](int64_t offset, Range rows, Range part) {
    if constexpr (Cell::projects) unproject(s, offset, rows, part);
  };
  if (partition.by_rows || !exact)  // what one thread does depends on no other
    worker.parallel_for(partition.count, [&](int64_t i) {
      each_step_reversed<T>(range, [&](int64_t t, int64_t offset) {
        const Range all{.begin = 0, .end = range.size(t)};
        const Range rows = partition.by_rows ? range_of(range.size(t), i, partition.count) : all;
        const Range every{.begin = 0, .end = vectors};
        if (exact) {
          output_step(offset, rows, {.begin = 0, .end = panels});
          unproject_step(offset, rows, {.begin = 0, .end = pairs});
        }
        local(t, offset, rows, partition.by_rows ? every : range_of(vectors, i, partition.count));
        if (exact) add_dense_product<T, Cell>(s, offset, rows, {.begin = 0, .end = panels});
      });
    });
  else
    each_step_reversed<T>(range, [&](int64_t t, int64_t offset) {
      const Range all{.begin = 0, .end = range.size(t)};
      // The gradients of h of the last step; those of the step before follow from the product at the end of a step.
      if (Cell::projects && t == range.steps - 1)
        worker.parallel_for(partition.count,
                            [&](int64_t i) { output_step(offset, all, range_of(panels, i, partition.count)); });
      worker.parallel_for(partition.count, [&](int64_t i) {
        const Range part = range_of(pairs, i, partition.count);
        unproject_step(offset, all, part);
        local(t, offset, all, {.begin = part.begin * N, .end = std::min(part.end * N, vectors)});
      });
      worker.parallel_for(partition.count, [&](int64_t i) {
        const Range part = range_of(panels, i, partition.count);
        add_dense_product<T, Cell>(s, offset, all, part);
        if (t > 0) output_step(offset - range.size(t - 1), {.begin = 0, .end = range.size(t - 1)}, part);
      });
    });
}

// gate_grads = du/dgates, of which diag(J) of a projected h is a product.
template <class T, class Cell>
void output_derivatives(Worker& worker, const ReverseArgs<T>& s) {
  const int64_t vectors = panel_count(s.range.hidden, lanes<T>), ranks = std::min(worker.ranks(), vectors);
  worker.parallel_for(ranks, [&](int64_t i) {
    each_step_reversed<T>(s.range, [&](int64_t t, int64_t offset) {
      const Range all{.begin = 0, .end = s.range.size(t)};
      each_vector<T, Cell>(s, t, offset, all, range_of(vectors, i, ranks), [](const ReverseRow<T>& row) {
        const typename Cell::Local local = Cell::local(row);
        for (int gate = 0; gate < Cell::gates; ++gate) row.put_gate_grad(gate, Cell::output_derivative(local, gate));
      });
    });
  });
}

// sums (states, hidden) += diag(J[t]) over all rows; with a projection du/dgates, (gates, hidden), in place of that of
// h, which is linear in them.
template <class T, class Cell>
void sum_jacobians(Worker& worker, const ReverseArgs<T>& s) {
  const int64_t vectors = panel_count(s.range.hidden, lanes<T>), ranks = std::min(worker.ranks(), vectors);
  worker.parallel_for(ranks, [&](int64_t i) {
    for (int64_t t = 0, offset = 0; t < s.range.steps; offset += s.range.size(t++)) {
      const Range all{.begin = 0, .end = s.range.size(t)};
      each_vector<T, Cell>(s, t, offset, all, range_of(vectors, i, ranks), [](const ReverseRow<T>& row) {
        const typename Cell::Local local = Cell::local(row);
        auto add = [&](int place, Vector<T> value) { row.put(row.sums, place, row.at(row.sums, place) + value); };
        constexpr int of_output = Cell::projects ? Cell::gates : 1;
        if constexpr (Cell::projects)
          for (int gate = 0; gate < Cell::gates; ++gate) add(gate, Cell::output_derivative(local, gate));
        else
          add(0, Cell::jacobian(row, local, 0));
        for (int state = 1; state < Cell::states; ++state)
          add(of_output + state - 1, Cell::jacobian(row, local, state));
      });
    }
  });
}

template <class Cell, class T>
constexpr CellLoops<T> cell_loops() {
  CellLoops<T> loops{.forward = forward<Plain<T>, Cell>,
                     .forward_bf16 = forward<Bf16For<T>, Cell>,
                     .reverse = reverse<T, Cell>,
                     .sum_jacobians = sum_jacobians<T, Cell>,
                     .reverse_output = nullptr,
                     .output_derivatives = nullptr};
  if constexpr (Cell::projects) {
    loops.reverse_output = reverse_output<T, Cell>;
    loops.output_derivatives = output_derivatives<T, Cell>;
  }
  return loops;
}

// The row of the table of a cell given as a template over float and double.
template <template <class> class Cell>
constexpr CellEntry cell_entry(std::string_view name) {
  using C = Cell<float>;
  return {.name = name,
          .gates = C::gates,
          .states = C::states,
          .constant_states = C::constant_states,
          .shared_gates = C::shared_gates,
          .aux_parts = C::aux_parts,
          .unit_vectors = C::unit_vectors,
          .projects = C::projects,
          .float_loops = cell_loops<Cell<float>, float>(),
          .double_loops = cell_loops<Cell<double>, double>()};
}

}  // namespace statefeed
