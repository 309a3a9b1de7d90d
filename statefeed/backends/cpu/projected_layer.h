// The output projection h = u W_hr^T in the backward pass of a layer: products over the rows of a chunk.
//   grad_u = delta W_hr,   grad_W_hr += delta^T u,   and for the rule jacobian D_h = du/dgates W
#pragma once

#include "chunks.h"
#include "layer.h"
#include "projection.h"

namespace statefeed {

// Without a projection all arrays are null, and nothing is done.
template <ProductTraits P>
struct ProjectedBackward {
  using T = typename P::value_t;
  using packed_t = typename P::packed_t;
  static constexpr int64_t padding = bulk_vectors * lanes<T>;  // vectors may reach beyond the last unit

  const LayerBackwardArgs<T>& s;
  const int64_t most, gate_grad_stride;  // rows of the largest chunk
  const CellEntry& cell = *s.layer.cell;
  const int64_t H = s.layer.range.hidden, O = s.layer.range.output, G = cell.gates * H;
  const bool exact = s.rule == Rule::exact, own_diagonal = cell.projects && s.rule == Rule::jacobian;
  T* delta = cell.projects ? workspace<T, Tag::output_grads>(most * O + padding) : nullptr;
  T* grad_unprojected = cell.projects ? workspace<T, Tag::unprojected_grads>(most * H) : nullptr;
  T* unprojected = cell.projects ? workspace<T, Tag::unprojected>(most * H + padding) : nullptr;
  T* diagonal = own_diagonal ? workspace<T, Tag::output_diagonal>(most * O) : nullptr;
  const PackedWeights<P> packed = with_memory<P, Tag::projection_weights>(
      {.w = s.layer.w_hr, .gates = 1, .units = H, .depth = O, .vectors = bulk_vectors, .by_columns = true},
      cell.projects && !exact);
  // The steps of exact BPTT are float32 in any case.
  const PackedWeights<Plain<T>> packed_of_steps = with_memory<Plain<T>, Tag::steps_projection_weights>(
      {.w = s.layer.w_hr, .gates = 1, .units = H, .depth = O, .vectors = projection_vectors, .by_columns = true},
      cell.projects&& exact);
  const PackedWeights<P> packed_diagonal = with_memory<P, Tag::diagonal_weights>(
      {.w = s.w_hh_diag, .gates = 1, .units = O, .depth = G, .vectors = bulk_vectors, .by_columns = true},
      own_diagonal);
  packed_t* tiles = cell.projects ? workspace<packed_t, Tag::output_tiles>(tiles_of(most, nullptr).size()) : nullptr;
  packed_t* panels =
      cell.projects ? workspace<packed_t, Tag::unprojected_panels>(panels_of(most, nullptr).size()) : nullptr;

  RowTiles<P> tiles_of(int64_t rows, packed_t* to) const { return {.rows = rows, .units = O, .from = delta, .to = to}; }
  RowPanels<P> panels_of(int64_t rows, packed_t* to) const {
    return {.rows = rows, .units = H, .row_stride = H, .from = unprojected, .to = to};
  }

  void pack_weights(Worker& worker) const { parallel_for(worker, packed, packed_of_steps, packed_diagonal); }

  // The gradients of h and of u of a chunk; those of the exact rule are computed with its steps.
  void reverse_output(Worker& worker, const ReverseArgs<T>& args) const {
    if (!cell.projects || exact) return;
    const auto& loops = cell.loops(T{});
    if (own_diagonal) {
      loops.output_derivatives(worker, args);
      parallel_for(worker, Product<P>{.rows = args.range.rows,
                                      .depth = G,
                                      .units = O,
                                      .a_stride = gate_grad_stride,
                                      .out_stride = O,
                                      .a = args.gate_grads,
                                      .packed = packed_diagonal.to,
                                      .out = diagonal});
    }
    loops.reverse_output(worker, args);
    parallel_for(worker, Product<P>{.rows = args.range.rows,
                                    .depth = O,
                                    .units = H,
                                    .a_stride = O,
                                    .out_stride = H,
                                    .a = delta,
                                    .packed = packed.to,
                                    .out = grad_unprojected});
  }

  void add_weight_grad(Worker& worker, int64_t rows, bool add) const {
    if (!cell.projects) return;
    const RowTiles<P> left = tiles_of(rows, tiles);
    const RowPanels<P> right = panels_of(rows, panels);
    parallel_for(worker, left, right);
    parallel_for(worker, RowProducts<P>{.left = left, .right = right, .out = s.grad_w_hr, .out_stride = H, .add = add});
  }
};

}  // namespace statefeed
