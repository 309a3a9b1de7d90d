// One layer in one direction, in chunks of time that stay in cache: the steps of a chunk, and products over all its
// rows.
//   grad_x = grad_input W_ih,   grad_W_ih^T += x^T grad_input,   grad_W_hh^T += h'^T grad_hidden   per chunk
#include "layer.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bulk.h"
#include "column_sums.h"

namespace statefeed {

namespace {

struct Chunk {
  int64_t first_step, steps, first_row, rows;
  int64_t batch, batch_before;  // rows of its first step, and of the step before
};

constexpr int64_t chunk_rows = bulk_depth;

std::vector<Chunk> chunks_of(const StepRange& range) {
  std::vector<Chunk> chunks;
  for (int64_t t = 0, row = 0; t < range.steps;) {
    Chunk chunk{.first_step = t,
                .steps = 0,
                .first_row = row,
                .rows = 0,
                .batch = range.size(t),
                .batch_before = t ? range.size(t - 1) : 0};
    for (; t < range.steps && (chunk.steps == 0 || chunk.rows + range.size(t) <= chunk_rows); ++t, ++chunk.steps)
      chunk.rows += range.size(t);
    row += chunk.rows;
    chunks.push_back(chunk);
  }
  return chunks;
}

int64_t most_rows(const std::vector<Chunk>& chunks) {
  int64_t most = 0;
  for (const Chunk& chunk : chunks) most = std::max(most, chunk.rows);
  return most;
}

StepRange range_of_chunk(const StepRange& range, const Chunk& chunk) {
  return {.steps = chunk.steps,
          .batch = chunk.batch,
          .hidden = range.hidden,
          .rows = chunk.rows,
          .batch_sizes = range.batch_sizes ? range.batch_sizes + chunk.first_step : nullptr};
}

// The states before the steps of a chunk, in the same order as the rows of its gradients. They are in y, one step
// earlier, except before the first step and where sequences end: there a step has fewer rows than the previous one.
template <class T>
struct StatesBefore {
  const StepRange& range;
  const Chunk& chunk;
  const T* y;
  const T* first;  // before the chunk's first step
  T* copy;

  bool in_y() const { return !range.batch_sizes && chunk.first_row; }
  const T* rows() const { return in_y() ? first : copy; }
  int64_t items() const { return in_y() ? 0 : 1; }
  void run(int64_t) const {
    const int64_t H = range.hidden;
    T* to = std::copy(first, first + chunk.batch * H, copy);
    const T* from = y + chunk.first_row * H;
    for (int64_t t = chunk.first_step + 1; t < chunk.first_step + chunk.steps; from += range.size(t - 1) * H, ++t)
      to = std::copy(from, from + range.size(t) * H, to);
  }
};

// The same weights with memory to pack them into, if they are needed.
template <ProductTraits P, Tag tag>
PackedWeights<P> with_memory(PackedWeights<P> weights, bool wanted = true) {
  weights.to = wanted ? workspace<typename P::packed_t, tag>(weights.size()) : nullptr;
  return weights;
}

template <ProductTraits P, class T = typename P::value_t>
void forward_chunks(const LayerForwardArgs<T>& s) {
  const LayerArgs<T>& layer = s.layer;
  const CellEntry& cell = *layer.cell;
  const int64_t H = layer.range.hidden, I = layer.inputs, G = cell.gates * H;
  const auto packed_w_ih = with_memory<P, Tag::input_weights>(
      {.w = layer.w_ih, .gates = 1, .units = G, .depth = I, .vectors = bulk_vectors, .by_columns = false});
  const auto packed_w_hh = with_memory<P, Tag::hidden_weights>({.w = layer.w_hh,
                                                                .gates = cell.gates,
                                                                .units = H,
                                                                .depth = H,
                                                                .vectors = cell.unit_vectors,
                                                                .by_columns = false});
  const auto forward = layer.bf16 ? cell.loops(T{}).forward_bf16 : cell.loops(T{}).forward;
  const std::vector<Chunk> chunks = chunks_of(layer.range);
  const int64_t shared = cell.shared_gates * H;
  const T* bias = s.b_ih ? add_shared_biases(s.b_ih, s.b_hh, shared, G, workspace<T, Tag::biases>(G)) : nullptr;
  const T* hidden_bias = s.b_hh && shared < G ? s.b_hh + shared : nullptr;
  T* unsaved_gates = s.gates ? nullptr : workspace<T, Tag::gates>(most_rows(chunks) * G);
  run_team<P>(layer.range.rows * G * (I + H), [&](Worker& worker) {
    parallel_for(worker, packed_w_ih, packed_w_hh);
    const T* first_h = s.h0;
    for (const Chunk& chunk : chunks) {
      const ForwardArgs<T> args{.range = range_of_chunk(layer.range, chunk),
                                .packed_w_hh = packed_w_hh.to,
                                .hidden_bias = hidden_bias,
                                .first_h = first_h,
                                .gates = s.gates ? s.gates + chunk.first_row * G : unsaved_gates,
                                .aux = s.aux ? s.aux + chunk.first_row * H : nullptr,
                                .y = s.y + chunk.first_row * H,
                                .c = s.c};
      parallel_for(worker, Product<P>{.rows = chunk.rows,
                                      .depth = I,
                                      .units = G,
                                      .a_stride = I,
                                      .out_stride = G,
                                      .a = layer.x + chunk.first_row * I,
                                      .packed = packed_w_ih.to,
                                      .bias = bias,
                                      .out = args.gates,
                                      .add = false});
      forward(worker, args);
      first_h = args.y + (chunk.rows - args.range.size(chunk.steps - 1)) * H;
    }
  });
}

template <ProductTraits P>
class Backward {
  using T = typename P::value_t;
  using packed_t = typename P::packed_t;

  const LayerBackwardArgs<T>& s;
  const CellEntry& cell = *s.layer.cell;
  const StepRange& range = s.layer.range;
  const int64_t H = range.hidden, I = s.layer.inputs, G = cell.gates * H, S = cell.states * H;
  // Gates with the same gradients at x W_ih^T and h W_hh^T, and the rest, whose gradients at h W_hh^T are apart.
  const int64_t shared = cell.shared_gates * H, separate = G - shared;
  const std::vector<Chunk> chunks = chunks_of(range);
  const int64_t most = most_rows(chunks);
  const int64_t stride = G + separate + lanes<T>;  // rows a power of two apart share cache sets
  T* gate_grads = workspace<T, Tag::gate_grads>(most * stride + bulk_vectors * lanes<T>);
  T* separate_grads = separate ? gate_grads + G : nullptr;
  T* states_before = workspace<T, Tag::states_before>(most * H);
  const PackedWeights<P> packed_w_ih = columns<P, Tag::input_weights>(s.layer.w_ih, I, G, s.grad_x);
  // Shared and separate gradients are in two buffers, and so their weights are in two packs. The steps of exact BPTT are
  // float32 in any case.
  const PackedWeights<Plain<T>> packed_w_hh =
      columns<Plain<T>, Tag::hidden_weights>(s.layer.w_hh, H, G, s.rule == Rule::exact);
  const PackedWeights<P> packed_shared = columns<P, Tag::shared_weights>(s.layer.w_hh, H, shared, s.corrections > 0);
  const PackedWeights<P> packed_separate =
      columns<P, Tag::separate_weights>(s.layer.w_hh + shared * H, H, separate, s.corrections > 0 && separate > 0);
  packed_t* x_tiles = workspace<packed_t, Tag::inputs>(RowTiles<P>{.rows = most, .units = I, .from = nullptr}.size());
  packed_t* h_tiles = workspace<packed_t, Tag::states>(RowTiles<P>{.rows = most, .units = H, .from = nullptr}.size());
  packed_t* gate_panels = workspace<packed_t, Tag::panels>(
      RowPanels<P>{.rows = most, .units = G, .row_stride = stride, .from = nullptr}.size());
  packed_t* separate_panels = workspace<packed_t, Tag::hidden_panels>(
      RowPanels<P>{.rows = most, .units = separate, .row_stride = stride, .from = nullptr}.size());
  T* grad_w_ih = workspace<T, Tag::weight_grads>(I * G);        // transposed: (I, G)
  T* grad_w_hh = workspace<T, Tag::state_weight_grads>(H * G);  // transposed: (H, G)
  // Of all gates, then of those at h W_hh^T that are apart.
  std::vector<double> bias_sums = std::vector<double>(static_cast<size_t>(s.grad_b_ih ? G + separate : 0));

  template <ProductTraits Q, Tag tag>
  static PackedWeights<Q> columns(const T* w, int64_t units, int64_t depth, bool wanted) {
    return with_memory<Q, tag>(
        {.w = w, .gates = 1, .units = units, .depth = depth, .vectors = bulk_vectors, .by_columns = true}, wanted);
  }

  ReverseArgs<T> reverse_args(const Chunk& chunk, const T* first_h, int64_t correction) {
    const int64_t row = chunk.first_row;
    const bool last = correction == s.corrections, per_row = s.rule == Rule::per_row;
    T* residual = s.residual ? s.residual + row * S : nullptr;
    return {.range = range_of_chunk(range, chunk),
            .rule = s.rule,
            .gates = s.gates + row * G,
            .aux = s.aux ? s.aux + row * H : nullptr,
            .y = s.y + row * H,
            .first_h = first_h,
            .first_c = row && s.aux ? s.aux + (row - chunk.batch_before) * H : s.c0,
            .grad_y = s.grad_y + row * H,
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
    auto product = [&](int64_t depth, const T* grads, const PackedWeights<P>& weights) {
      parallel_for(worker, Product<P>{.rows = chunk.rows,
                                      .depth = depth,
                                      .units = H,
                                      .a_stride = stride,
                                      .out_stride = S,
                                      .a = grads,
                                      .packed = weights.to,
                                      .out = residual,
                                      .add = true});
    };
    product(shared, gate_grads, packed_shared);
    if (separate) product(separate, separate_grads, packed_separate);
  }

  void add_weight_grads(Worker& worker, const Chunk& chunk, const T* first_h, bool add) {
    const int64_t rows = chunk.rows, row = chunk.first_row;
    const StatesBefore<T> before{.range = range, .chunk = chunk, .y = s.y, .first = first_h, .copy = states_before};
    const RowTiles<P> x{.rows = rows, .units = I, .from = s.layer.x + row * I, .to = x_tiles};
    const RowTiles<P> h{.rows = rows, .units = H, .from = before.rows(), .to = h_tiles};
    auto panels = [&](int64_t units, const T* from, packed_t* to) {
      return RowPanels<P>{.rows = rows, .units = units, .row_stride = stride, .from = from, .to = to};
    };
    const RowPanels<P> all_grads = panels(G, gate_grads, gate_panels),
                       shared_grads = panels(shared, gate_grads, gate_panels);
    const RowPanels<P> separate_rows = panels(separate, separate_grads, separate_panels);
    auto product = [&](const RowTiles<P>& left, const RowPanels<P>& right, T* out) {
      return RowProducts<P>{.left = left, .right = right, .out = out, .out_stride = G, .add = add};
    };
    auto column_sums = [&](int64_t units, const T* from, int64_t offset) {
      double* totals = s.grad_b_ih ? bias_sums.data() + offset : nullptr;
      return ColumnSums<T>{.rows = rows, .units = units, .stride = stride, .from = from, .totals = totals};
    };
    parallel_for(worker, before);
    parallel_for(worker, x, h, all_grads, separate_rows, column_sums(G, gate_grads, 0),
                 column_sums(separate, separate_grads, G),
                 Product<P>{.rows = rows,
                            .depth = G,
                            .units = I,
                            .a_stride = stride,
                            .out_stride = I,
                            .a = gate_grads,
                            .packed = packed_w_ih.to,
                            .out = s.grad_x ? s.grad_x + row * I : nullptr});
    parallel_for(worker, product(x, all_grads, grad_w_ih), product(h, shared_grads, grad_w_hh),
                 product(h, separate_rows, grad_w_hh + shared));
  }

  void walk(Worker& worker) {
    parallel_for(worker, packed_w_ih, packed_w_hh, packed_shared, packed_separate);
    for (int64_t correction = 0; correction <= s.corrections; ++correction) {
      worker.parallel_for(
          1, [&](int64_t) { std::copy(s.grad_final, s.grad_final + range.batch * S, s.carry); });
      for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) {
        const T* first_h = chunk->first_row ? s.y + (chunk->first_row - chunk->batch_before) * H : s.h0;
        cell.loops(T{}).reverse(worker, reverse_args(*chunk, first_h, correction));
        if (correction < s.corrections)
          add_dense_residual(worker, *chunk);
        else
          add_weight_grads(worker, *chunk, first_h, chunk != chunks.rbegin());
      }
    }
    if (!chunks.empty())
      parallel_for(worker, Transpose<T>{.units = G, .inputs = I, .stride = G, .from = grad_w_ih, .out = s.grad_w_ih},
                   Transpose<T>{.units = G, .inputs = H, .stride = G, .from = grad_w_hh, .out = s.grad_w_hh});
  }

 public:
  explicit Backward(const LayerBackwardArgs<T>& args) : s(args) {}

  void run() {
    if (chunks.empty()) {
      std::fill(s.grad_w_ih, s.grad_w_ih + G * I, T(0));
      std::fill(s.grad_w_hh, s.grad_w_hh + G * H, T(0));
    }
    run_team<P>(range.rows * G * ((s.grad_x ? 2 : 1) * I + H), [&](Worker& worker) { walk(worker); });
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
