// One layer in one direction, in chunks of time that stay in cache: the steps of a chunk, and products over all its
// rows.
//   grad_x = grad_input W_ih,   grad_W_ih^T += x^T grad_input,   grad_W_hh^T += h'^T grad_hidden   per chunk
#include "layer.h"

#include <algorithm>
#include <vector>

#include "bulk.h"
#include "chunks.h"
#include "column_sums.h"
#include "projected_layer.h"

namespace statefeed {

namespace {

// The last row of every sequence: those that have no row in the next step.
template <class T>
void copy_last_rows(const StepRange& range, const T* y, T* last) {
  for (int64_t t = 0; t < range.steps; ++t) {
    const int64_t rows = range.size(t), remaining = t + 1 < range.steps ? range.size(t + 1) : 0;
    std::copy(y + remaining * range.output, y + rows * range.output, last + remaining * range.output);
    y += rows * range.output;
  }
}

template <ProductTraits P, class T = typename P::value_t>
void forward_chunks(const LayerForwardArgs<T>& s) {
  const LayerArgs<T>& layer = s.layer;
  const CellEntry& cell = *layer.cell;
  const int64_t H = layer.range.hidden, I = layer.inputs, G = cell.gates * H, A = cell.aux_parts * H;
  const int64_t O = layer.range.output, columns = O / layer.heads;  // of W_hh
  const auto packed_w_ih = with_memory<P, Tag::input_weights>(
      {.w = layer.w_ih, .gates = 1, .units = G, .depth = I, .vectors = bulk_vectors, .by_columns = false}, I > 0);
  const auto packed_w_hh = with_memory<P, Tag::hidden_weights>({.w = layer.w_hh,
                                                                .gates = cell.gates,
                                                                .units = H / layer.heads,
                                                                .depth = columns,
                                                                .vectors = cell.unit_vectors,
                                                                .by_columns = false,
                                                                .blocks = layer.heads});
  const auto packed_w_hr = with_memory<P, Tag::projection_weights>(
      {.w = layer.w_hr, .gates = 1, .units = O, .depth = H, .vectors = projection_vectors, .by_columns = false},
      cell.projects);
  T* unprojected = cell.projects ? workspace<T, Tag::unprojected>(layer.range.batch * H) : nullptr;
  const auto forward = layer.bf16 ? cell.loops(T{}).forward_bf16 : cell.loops(T{}).forward;
  const std::vector<Chunk> chunks = chunks_of(layer.range);
  const int64_t shared = cell.shared_gates * H;
  const T* bias = s.b_ih ? add_shared_biases(s.b_ih, s.b_hh, shared, G, workspace<T, Tag::biases>(G)) : nullptr;
  const T* hidden_bias = s.b_hh && shared < G ? s.b_hh + shared : nullptr;
  T* unsaved_gates = s.gates ? nullptr : workspace<T, Tag::gates>(most_rows(chunks) * G);
  run_team<P>(layer.range.rows * G * (I + columns), [&](Worker& worker) {
    parallel_for(worker, packed_w_ih, packed_w_hh, packed_w_hr);
    const T* first_h = s.h0;
    for (const Chunk& chunk : chunks) {
      const ForwardArgs<T> args{.range = range_of_chunk(layer.range, chunk),
                                .heads = layer.heads,
                                .packed_w_hh = packed_w_hh.to,
                                .hidden_bias = hidden_bias,
                                .first_h = first_h,
                                .gates = s.gates ? s.gates + chunk.first_row * G : unsaved_gates,
                                .aux = s.aux ? s.aux + chunk.first_row * A : nullptr,
                                .y = s.y + chunk.first_row * O,
                                .packed_w_hr = packed_w_hr.to,
                                .unprojected = unprojected,
                                .c = s.c};
      parallel_for(worker,
                   Product<P>{.rows = chunk.rows,
                              .depth = I,
                              .units = G,
                              .a_stride = I,
                              .out_stride = G,
                              .a = layer.x + chunk.first_row * I,
                              .packed = packed_w_ih.to,
                              .bias = bias,
                              .out = I ? args.gates : nullptr,
                              .add = false},
                   RowCopies<T>{.rows = chunk.rows,
                                .units = G,
                                .from_stride = G,
                                .to_stride = G,
                                .from = layer.x + chunk.first_row * G,
                                .bias = bias,
                                .to = I ? nullptr : args.gates});
      forward(worker, args);
      first_h = args.y + (chunk.rows - args.range.size(chunk.steps - 1)) * O;
    }
  });
  copy_last_rows(layer.range, s.y, s.h);
}

template <ProductTraits P>
class Backward {
  using T = typename P::value_t;
  using packed_t = typename P::packed_t;

  const LayerBackwardArgs<T>& s;
  const CellEntry& cell = *s.layer.cell;
  const StepRange& range = s.layer.range;
  const int64_t H = range.hidden, O = range.output, I = s.layer.inputs;
  const int64_t G = cell.gates * H, S = cell.state_size(range), A = cell.aux_parts * H;
  const int64_t heads = s.layer.heads, columns = O / heads;  // columns of W_hh
  // Gates with the same gradients at x W_ih^T and h W_hh^T, and the rest, whose gradients at h W_hh^T are apart.
  const int64_t shared = cell.shared_gates * H, separate = G - shared;
  const std::vector<Chunk> chunks = chunks_of(range);
  const int64_t most = most_rows(chunks);
  const int64_t stride = G + separate + lanes<T>;  // rows a power of two apart share cache sets
  T* gate_grads = workspace<T, Tag::gate_grads>(most * stride + bulk_vectors * lanes<T>);
  T* separate_grads = separate ? gate_grads + G : nullptr;
  T* states_before = workspace<T, Tag::states_before>(most * O);
  const PackedWeights<P> packed_w_ih = with_memory<P, Tag::input_weights>(
      {.w = s.layer.w_ih, .gates = 1, .units = I, .depth = G, .vectors = bulk_vectors, .by_columns = true},
      s.grad_x&& I);
  // Shared and separate gradients are in two buffers, and so their weights are in two packs. The steps of exact BPTT
  // are float32 in any case.
  const PackedWeights<Plain<T>> packed_w_hh =
      hidden_weights<Plain<T>, Tag::hidden_weights>(s.layer.w_hh, G, s.rule == Rule::exact);
  const PackedWeights<P> packed_shared =
      hidden_weights<P, Tag::shared_weights>(s.layer.w_hh, shared, s.corrections > 0);
  const PackedWeights<P> packed_separate =
      hidden_weights<P, Tag::separate_weights>(s.layer.w_hh + shared * columns, separate, s.corrections&& separate);
  packed_t* x_tiles = workspace<packed_t, Tag::inputs>(RowTiles<P>{.rows = most, .units = I, .from = nullptr}.size());
  packed_t* h_tiles = workspace<packed_t, Tag::states>(tiles_of_h(most, nullptr, nullptr).size());
  packed_t* gate_panels = workspace<packed_t, Tag::panels>(panels_of(most, G, nullptr, nullptr).size());
  packed_t* separate_panels =
      workspace<packed_t, Tag::hidden_panels>(panels_of(most, separate, nullptr, nullptr).size());
  T* grad_w_ih = workspace<T, Tag::weight_grads>(I * G);              // transposed: (I, G)
  T* grad_w_hh = workspace<T, Tag::state_weight_grads>(columns * G);  // transposed: (columns, G)
  // Of all gates, then of those at h W_hh^T that are apart.
  std::vector<double> bias_sums = std::vector<double>(static_cast<size_t>(s.grad_b_ih ? G + separate : 0));

  ProjectedBackward<P> projection{s, most, stride};
  // Gates with `units` units in all, as blocks. One head: one block. Several heads: a block for every gate and head,
  // because the gradients of a head are a part of every gate's.
  int64_t block_units(int64_t units) const { return heads == 1 ? units : columns; }
  int64_t blocks_of(int64_t units) const { return heads == 1 ? 1 : units / columns; }
  // The rows of W_hh of these gates.
  template <ProductTraits Q, Tag tag>
  PackedWeights<Q> hidden_weights(const T* w, int64_t units, bool wanted) const {
    return with_memory<Q, tag>({.w = w,
                                .gates = 1,
                                .units = columns,
                                .depth = block_units(units),
                                .vectors = bulk_vectors,
                                .by_columns = true,
                                .blocks = blocks_of(units)},
                               wanted);
  }
  // The gradients of these gates.
  RowPanels<P> panels_of(int64_t rows, int64_t units, const T* from, packed_t* to) const {
    return {.rows = rows,
            .units = block_units(units),
            .row_stride = stride,
            .from = from,
            .to = to,
            .blocks = blocks_of(units)};
  }
  RowTiles<P> tiles_of_h(int64_t rows, const T* from, packed_t* to) const {
    return {.rows = rows, .units = columns, .from = from, .to = to, .blocks = heads};
  }

  ReverseArgs<T> reverse_args(const Chunk& chunk, const T* first_h, int64_t correction) {
    const int64_t row = chunk.first_row;
    const bool last = correction == s.corrections, per_row = s.rule == Rule::per_row;
    T* residual = s.residual ? s.residual + row * S : nullptr;
    return {.range = range_of_chunk(range, chunk),
            .heads = heads,
            .rule = s.rule,
            .gates = s.gates + row * G,
            .aux = s.aux ? s.aux + row * A : nullptr,
            .y = s.y + row * O,
            .first_h = first_h,
            .first_c = row && s.aux ? s.aux + (row - chunk.batch_before) * A : s.c0,
            .first_c_stride = row ? A : cell.parts_of_c() * H,
            .grad_y = s.grad_y + row * O,
            .delta = projection.delta,
            .grad_unprojected = projection.grad_unprojected,
            .unprojected = projection.unprojected,
            .packed_w_hr = projection.packed_of_steps.to,
            .output_diagonal = projection.diagonal,
            .diagonal = per_row ? s.diagonal + row * S : s.diagonal,
            .diagonal_stride = per_row ? S : 0,
            .w_hh_diag = s.w_hh_diag,
            .residual = correction ? residual : nullptr,
            .next_residual = last ? nullptr : residual,
            .packed_w_hh = packed_w_hh.to,
            .carry = s.carry,
            .gate_grad_stride = stride,
            .gate_grads = gate_grads,
            .separate_grads = separate_grads,
            .sums = nullptr};
  }

  // residual += (gradients of the hidden side) @ W_hh
  void add_dense_residual(Worker& worker, const Chunk& chunk) {
    T* residual = s.residual + chunk.first_row * S;
    auto product = [&](const T* grads, const PackedWeights<P>& weights) {
      for (int64_t block = 0; block < weights.blocks; block += heads)
        parallel_for(worker, Product<P>{.rows = chunk.rows,
                                        .depth = weights.depth,
                                        .units = columns,
                                        .a_stride = stride,
                                        .out_stride = S,
                                        .a = grads + block * weights.depth,
                                        .packed = weights.to + block * weights.panels() * weights.panel_size(),
                                        .out = residual,
                                        .add = true,
                                        .blocks = heads});
    };
    product(gate_grads, packed_shared);
    if (separate) product(separate_grads, packed_separate);
  }

  void add_weight_grads(Worker& worker, const Chunk& chunk, const T* first_h, bool add) {
    const int64_t rows = chunk.rows, row = chunk.first_row;
    const StatesBefore<T> before{.range = range, .chunk = chunk, .y = s.y, .first = first_h, .copy = states_before};
    const RowTiles<P> x{.rows = rows, .units = I, .from = s.layer.x + row * I, .to = x_tiles};
    const RowTiles<P> h = tiles_of_h(rows, before.rows(), h_tiles);
    const RowPanels<P> all_grads = panels_of(rows, G, gate_grads, gate_panels),
                       shared_grads = panels_of(rows, shared, gate_grads, gate_panels);
    const RowPanels<P> separate_rows = panels_of(rows, separate, separate_grads, separate_panels);
    auto product = [&](const RowTiles<P>& left, const RowPanels<P>& right, T* out) {
      return RowProducts<P>{.left = left, .right = right, .out = out, .out_stride = G, .add = add};
    };
    auto column_sums = [&](int64_t units, const T* from, int64_t offset) {
      double* totals = s.grad_b_ih ? bias_sums.data() + offset : nullptr;
      return ColumnSums<T>{.rows = rows, .units = units, .stride = stride, .from = from, .totals = totals};
    };
    parallel_for(worker, before);
    projection.add_weight_grad(worker, rows, add);
    parallel_for(worker, x, h, all_grads, separate_rows, column_sums(G, gate_grads, 0),
                 column_sums(separate, separate_grads, G),
                 Product<P>{.rows = rows,
                            .depth = G,
                            .units = I,
                            .a_stride = stride,
                            .out_stride = I,
                            .a = gate_grads,
                            .packed = packed_w_ih.to,
                            .out = s.grad_x && I ? s.grad_x + row * I : nullptr},
                 RowCopies<T>{.rows = rows,
                              .units = G,
                              .from_stride = stride,
                              .to_stride = G,
                              .from = gate_grads,
                              .to = s.grad_x && !I ? s.grad_x + row * G : nullptr});
    parallel_for(worker, product(x, all_grads, grad_w_ih), product(h, shared_grads, grad_w_hh),
                 product(h, separate_rows, grad_w_hh + shared));
  }

  void walk(Worker& worker) {
    parallel_for(worker, packed_w_ih, packed_w_hh, packed_shared, packed_separate);
    projection.pack_weights(worker);
    for (int64_t correction = 0; correction <= s.corrections; ++correction) {
      worker.parallel_for(1, [&](int64_t) { std::copy(s.grad_final, s.grad_final + range.batch * S, s.carry); });
      for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) {
        const T* first_h = chunk->first_row ? s.y + (chunk->first_row - chunk->batch_before) * O : s.h0;
        const ReverseArgs<T> args = reverse_args(*chunk, first_h, correction);
        projection.reverse_output(worker, args);
        cell.loops(T{}).reverse(worker, args);
        if (correction < s.corrections)
          add_dense_residual(worker, *chunk);
        else
          add_weight_grads(worker, *chunk, first_h, chunk != chunks.rbegin());
      }
    }
    if (!chunks.empty())
      parallel_for(worker, Transpose<T>{.units = G, .inputs = I, .stride = G, .from = grad_w_ih, .out = s.grad_w_ih},
                   Transpose<T>{.units = G, .inputs = columns, .stride = G, .from = grad_w_hh, .out = s.grad_w_hh});
  }

 public:
  explicit Backward(const LayerBackwardArgs<T>& args) : s(args) {}

  void run() {
    if (chunks.empty()) {
      std::fill(s.grad_w_ih, s.grad_w_ih + G * I, T(0));
      std::fill(s.grad_w_hh, s.grad_w_hh + G * columns, T(0));
      if (s.grad_w_hr) std::fill(s.grad_w_hr, s.grad_w_hr + O * H, T(0));
    }
    run_team<P>(range.rows * G * ((s.grad_x ? 2 : 1) * I + columns), [&](Worker& worker) { walk(worker); });
    for (int64_t k = 0; s.grad_b_ih && k < G; ++k) {
      s.grad_b_ih[k] = static_cast<T>(bias_sums[static_cast<size_t>(k)]);
      s.grad_b_hh[k] = static_cast<T>(bias_sums[static_cast<size_t>(k < shared ? k : k + separate)]);
    }
  }
};

}  // namespace

template <class T>
void layer_forward(const LayerForwardArgs<T>& s) {
  s.layer.bf16 ? forward_chunks<Bf16For<T>>(s) : forward_chunks<Plain<T>>(s);
}
template <class T>
void layer_backward(const LayerBackwardArgs<T>& s) {
  s.layer.bf16 ? Backward<Bf16For<T>>(s).run() : Backward<Plain<T>>(s).run();
}

template void layer_forward<float>(const LayerForwardArgs<float>&);
template void layer_forward<double>(const LayerForwardArgs<double>&);
template void layer_backward<float>(const LayerBackwardArgs<float>&);
template void layer_backward<double>(const LayerBackwardArgs<double>&);

}  // namespace statefeed
