// One layer in one direction, in chunks of time: products over all rows of a chunk, then or before its steps.
//   d_x = d_input W_ih,   d_ih += d_input^T x,   d_hh += d_hidden^T h'   while the chunk's d is in cache
#include <algorithm>
#include <cstring>
#include <vector>

#include "bulk.h"
#include "kernels.h"

namespace statefeed {

namespace {

struct Chunk {
  int64_t first_step, steps, first_row, rows, batch, before;  // batch, before: rows of its first step and the one before
};

constexpr int64_t chunk_rows = bulk_depth;

template <class T>
std::vector<Chunk> chunks(const Stretch<T>& s) {
  std::vector<Chunk> all;
  for (int64_t t = 0, row = 0; t < s.steps;) {
    Chunk chunk{t, 0, row, 0, s.size(t), t ? s.size(t - 1) : 0};
    for (; t < s.steps && (chunk.steps == 0 || chunk.rows + s.size(t) <= chunk_rows); ++t, ++chunk.steps) chunk.rows += s.size(t);
    row += chunk.rows;
    all.push_back(chunk);
  }
  return all;
}

template <class T, class Arguments>
Arguments stretch_of(const Layer<T>& s, const Chunk& chunk) {
  Arguments part{};
  part.steps = chunk.steps, part.batch = chunk.batch, part.hidden = s.hidden;
  part.sizes = s.sizes ? s.sizes + chunk.first_step : nullptr;
  return part;
}

// The states before the steps of a chunk, as rows beside d: where sequences end they do not lie one after the other.
template <class T>
const T* states_before(const LayerBackward<T>& s, const Chunk& chunk, const T* first) {
  const int64_t H = s.hidden;
  if (!s.sizes && chunk.first_row) return first;
  T* rows = scratch<T, Use::states_before>(chunk.rows * H);
  T* to = std::copy(first, first + chunk.batch * H, rows);
  const T* from = s.y + chunk.first_row * H;
  for (int64_t t = chunk.first_step + 1; t < chunk.first_step + chunk.steps; from += s.size(t - 1) * H, ++t)
    to = std::copy(from, from + s.size(t) * H, to);
  return rows;
}

template <class P, class T = typename P::Out>
void layer_forward(const LayerForward<T>& s) {
  const CellKernels<T>& cell = *s.cell;
  const int64_t H = s.hidden, G = cell.gates * H;
  const auto* input_weights = pack_rows<P, Use::input_weights>(s.w_ih, 1, G, s.inputs, bulk_vectors);
  const auto* hidden_weights = pack_rows<P, Use::hidden_weights>(s.w_hh, cell.gates, H, H, cell.unit_vectors);
  const auto forward = s.rounded ? cell.forward_rounded : cell.forward;
  const T* previous = s.h0;
  for (const Chunk& chunk : chunks(s)) {
    auto part = stretch_of<T, Forward<T>>(s, chunk);
    part.packed = hidden_weights, part.bias = s.hidden_bias, part.first_h = previous, part.c = s.c;
    part.gates = s.gates ? s.gates + chunk.first_row * G : scratch<T, Use::gates>(chunk.rows * G);
    part.extra = s.extra ? s.extra + chunk.first_row * H : nullptr;
    part.y = s.y + chunk.first_row * H;
    product<P>({chunk.rows, s.inputs, G, s.inputs, G, s.x + chunk.first_row * s.inputs, input_weights, s.bias,
                part.gates, false});
    forward(part);
    previous = part.y + (chunk.rows - part.size(chunk.steps - 1)) * H;
  }
}

template <class P, class T = typename P::Out>
void layer_backward(const LayerBackward<T>& s) {
  const CellKernels<T>& cell = *s.cell;
  const int64_t H = s.hidden, G = cell.gates * H, S = cell.states * H, shared = cell.split * H;
  const std::vector<Chunk> all = chunks(s);
  int64_t most = 0;
  for (const Chunk& chunk : all) most = std::max(most, chunk.rows);
  const int64_t d_stride = G + 64 / static_cast<int64_t>(sizeof(T));  // rows a power of two apart share cache sets
  T* d = scratch<T, Use::d>(most * d_stride);
  T* d_hidden = shared < G ? scratch<T, Use::d_hidden>(most * H) : nullptr;
  const auto* input_weights = s.d_x ? pack_columns<P, Use::input_weights>(s.w_ih, s.inputs, G, bulk_vectors) : nullptr;
  // Shared and own gates of d_hidden lie in two buffers, and so their weights in two packs; the exact backward's steps
  // are float32 in any case.
  const T* every = s.exact ? pack_columns<Exact<T>, Use::hidden_weights>(s.w_hh, H, G, bulk_vectors) : nullptr;
  const auto* shared_weights =
      s.corrections ? pack_columns<P, Use::shared_weights>(s.w_hh, H, shared, bulk_vectors) : nullptr;
  const auto* own_weights =
      s.corrections && shared < G ? pack_columns<P, Use::own_weights>(s.w_hh + shared * H, H, G - shared, bulk_vectors) : nullptr;

  for (int64_t k = 0; k <= s.corrections; ++k) {
    std::copy(s.final_e, s.final_e + s.batch * S, s.carry);
    std::fill(s.sums, s.sums + cell.sums * H, T(0));
    for (auto at = all.rbegin(); at != all.rend(); ++at) {
      const Chunk& chunk = *at;
      const int64_t row = chunk.first_row, before = row - chunk.before;
      const T* first_h = row ? s.y + before * H : s.h0;
      T* residual = s.residual ? s.residual + row * S : nullptr;
      auto part = stretch_of<T, Reverse<T>>(s, chunk);
      part.gates = s.gates + row * G, part.extra = s.extra ? s.extra + row * H : nullptr, part.y = s.y + row * H;
      part.first_h = first_h, part.first_c = row && s.extra ? s.extra + before * H : s.c0;
      part.e = s.e + row * H, part.diagonal = s.diagonal, part.packed = every;
      part.residual = k ? residual : nullptr, part.next_residual = k < s.corrections ? residual : nullptr;
      part.carry = s.carry, part.d = d, part.d_hidden = d_hidden, part.d_stride = d_stride, part.sums = s.sums;
      cell.reverse(part, s.mode);
      if (k < s.corrections) {
        product<P>({chunk.rows, shared, H, d_stride, S, d, shared_weights, nullptr, residual, true});
        if (own_weights) product<P>({chunk.rows, G - shared, H, H, S, d_hidden, own_weights, nullptr, residual, true});
        continue;
      }
      if (s.d_x)
        product<P>({chunk.rows, G, s.inputs, d_stride, s.inputs, d, input_weights, nullptr, s.d_x + row * s.inputs, false});
      add_row_products<P>({chunk.rows, G, s.inputs, d_stride, s.inputs, s.inputs, d, s.x + row * s.inputs, s.d_ih});
      const T* h = states_before(s, chunk, first_h);
      add_row_products<P>({chunk.rows, shared, H, d_stride, H, H, d, h, s.d_hh});
      if (shared < G) add_row_products<P>({chunk.rows, G - shared, H, H, H, H, d_hidden, h, s.d_hh + shared * H});
    }
  }
}

}  // namespace

template <class T>
void run_layer_forward(const LayerForward<T>& s) {
  s.rounded ? layer_forward<RoundedFor<T>>(s) : layer_forward<Exact<T>>(s);
}
template <class T>
void run_layer_backward(const LayerBackward<T>& s) {
  s.rounded ? layer_backward<RoundedFor<T>>(s) : layer_backward<Exact<T>>(s);
}

template void run_layer_forward<float>(const LayerForward<float>&);
template void run_layer_forward<double>(const LayerForward<double>&);
template void run_layer_backward<float>(const LayerBackward<float>&);
template void run_layer_backward<double>(const LayerBackward<double>&);

}  // namespace statefeed
