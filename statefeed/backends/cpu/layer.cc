// One layer in one direction, in chunks of time: products over all rows of a chunk, then or before its steps.
//   d_x = d_input W_ih,   d_ih^T += x^T d_input,   d_hh^T += h'^T d_hidden   while the chunk's d is in cache
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

int64_t most_rows(const std::vector<Chunk>& all) {
  int64_t most = 0;
  for (const Chunk& chunk : all) most = std::max(most, chunk.rows);
  return most;
}

template <class T, class Arguments>
Arguments stretch_of(const Layer<T>& s, const Chunk& chunk) {
  Arguments part{};
  part.steps = chunk.steps, part.batch = chunk.batch, part.hidden = s.hidden, part.rows = chunk.rows;
  part.sizes = s.sizes ? s.sizes + chunk.first_step : nullptr;
  return part;
}

// The states before the steps of a chunk, as rows beside d: where sequences end they do not lie one after the other.
template <class T>
struct StatesBefore {
  const LayerBackward<T>& s;
  const Chunk& chunk;
  const T* first;
  T* rows;

  bool lie_in_y() const { return !s.sizes && chunk.first_row; }
  const T* found() const { return lie_in_y() ? first : rows; }
  int64_t items() const { return lie_in_y() ? 0 : 1; }
  void run(int64_t) const {
    const int64_t H = s.hidden;
    T* to = std::copy(first, first + chunk.batch * H, rows);
    const T* from = s.y + chunk.first_row * H;
    for (int64_t t = chunk.first_step + 1; t < chunk.first_step + chunk.steps; from += s.size(t - 1) * H, ++t)
      to = std::copy(from, from + s.size(t) * H, to);
  }
};

template <class P, Use U>
Packing<P> packing(Packing<P> weights, bool wanted = true) {
  weights.to = wanted ? scratch<typename P::In, U>(weights.size()) : nullptr;
  return weights;
}

template <class P, class T = typename P::Out>
void layer_forward(const LayerForward<T>& s) {
  const CellKernels<T>& cell = *s.cell;
  const int64_t H = s.hidden, G = cell.gates * H;
  const auto input = packing<P, Use::input_weights>({s.w_ih, 1, G, s.inputs, bulk_vectors, false, nullptr});
  const auto hidden = packing<P, Use::hidden_weights>({s.w_hh, cell.gates, H, H, cell.unit_vectors, false, nullptr});
  const auto forward = s.rounded ? cell.forward_rounded : cell.forward;
  const std::vector<Chunk> all = chunks(s);
  T* gates = s.gates ? nullptr : scratch<T, Use::gates>(most_rows(all) * G);
  with_team<P>(s.rows * G * (s.inputs + H), [&](Member& member) {
    divide(member, input, hidden);
    const T* previous = s.h0;
    for (const Chunk& chunk : all) {
      auto part = stretch_of<T, Forward<T>>(s, chunk);
      part.packed = hidden.to, part.bias = s.hidden_bias, part.first_h = previous, part.c = s.c;
      part.gates = s.gates ? s.gates + chunk.first_row * G : gates;
      part.extra = s.extra ? s.extra + chunk.first_row * H : nullptr;
      part.y = s.y + chunk.first_row * H;
      divide(member, Product<P>{chunk.rows, s.inputs, G, s.inputs, G, s.x + chunk.first_row * s.inputs, input.to, s.bias,
                                part.gates, false});
      forward(member, part);
      previous = part.y + (chunk.rows - part.size(chunk.steps - 1)) * H;
    }
  });
}

template <class P, class T = typename P::Out>
void layer_backward(const LayerBackward<T>& s) {
  const CellKernels<T>& cell = *s.cell;
  const int64_t H = s.hidden, G = cell.gates * H, S = cell.states * H, shared = cell.split * H, own = G - shared;
  const std::vector<Chunk> all = chunks(s);
  if (all.empty()) {
    std::fill(s.d_ih, s.d_ih + G * s.inputs, T(0));
    std::fill(s.d_hh, s.d_hh + G * H, T(0));
  }
  const int64_t most = most_rows(all);
  const int64_t d_stride = G + own + lanes<T>;  // rows a power of two apart share cache sets
  T* d = scratch<T, Use::d>(most * d_stride + bulk_vectors * lanes<T>);
  T* d_hidden = own ? d + G : nullptr;
  T* before_rows = scratch<T, Use::states_before>(most * H);
  const auto input = packing<P, Use::input_weights>({s.w_ih, 1, s.inputs, G, bulk_vectors, true, nullptr}, s.d_x);
  // Shared and own gates of d_hidden lie in two buffers, and so their weights in two packs; the exact backward's steps
  // are float32 in any case.
  const auto every = packing<Exact<T>, Use::hidden_weights>({s.w_hh, 1, H, G, bulk_vectors, true, nullptr}, s.exact);
  const auto first = packing<P, Use::shared_weights>({s.w_hh, 1, H, shared, bulk_vectors, true, nullptr}, s.corrections);
  const auto second =
      packing<P, Use::own_weights>({s.w_hh + shared * H, 1, H, own, bulk_vectors, true, nullptr}, s.corrections && own);
  RowTiles<P> x{most, s.inputs, nullptr, nullptr}, h{most, H, nullptr, nullptr};
  x.to = scratch<typename P::In, Use::inputs>(x.size());
  h.to = scratch<typename P::In, Use::states>(h.size());
  RowPanels<P> panels{most, G, d_stride, d, nullptr}, hidden_panels{most, own, d_stride, d_hidden, nullptr};
  panels.to = scratch<typename P::In, Use::panels>(panels.size());
  hidden_panels.to = scratch<typename P::In, Use::hidden_panels>(hidden_panels.size());
  T* d_ih = scratch<T, Use::weight_gradients>(s.inputs * G);
  T* d_hh = scratch<T, Use::state_weight_gradients>(H * G);
  const int64_t work = s.rows * G * (s.d_x ? 2 * s.inputs + H : s.inputs + H), width = cell.sums * H;
  std::vector<T> sums(static_cast<size_t>(thread_count() * width));

  with_team<P>(work, [&](Member& member) {
    divide(member, input, every, first, second);
    for (int64_t k = 0; k <= s.corrections; ++k) {
      const bool last = k == s.corrections;
      member.divide(1, [&](int64_t) {
        std::copy(s.final_e, s.final_e + s.batch * S, s.carry);
        std::fill(sums.begin(), sums.end(), T(0));
      });
      for (auto at = all.rbegin(); at != all.rend(); ++at) {
        const Chunk& chunk = *at;
        const int64_t rows = chunk.rows, row = chunk.first_row, before = row - chunk.before;
        const T* first_h = row ? s.y + before * H : s.h0;
        T* residual = s.residual ? s.residual + row * S : nullptr;
        auto part = stretch_of<T, Reverse<T>>(s, chunk);
        part.rule = s.rule;
        part.gates = s.gates + row * G, part.extra = s.extra ? s.extra + row * H : nullptr, part.y = s.y + row * H;
        part.first_h = first_h, part.first_c = row && s.extra ? s.extra + before * H : s.c0;
        part.e = s.e + row * H, part.diagonal = s.diagonal, part.packed = every.to;
        part.residual = k ? residual : nullptr, part.next_residual = last ? nullptr : residual;
        part.carry = s.carry, part.d = d, part.d_hidden = d_hidden, part.d_stride = d_stride, part.sums = sums.data();
        cell.reverse(member, part);
        if (!last) {
          divide(member, Product<P>{rows, shared, H, d_stride, S, d, first.to, nullptr, residual, true});
          if (own) divide(member, Product<P>{rows, own, H, d_stride, S, d_hidden, second.to, nullptr, residual, true});
          continue;
        }
        const StatesBefore<T> states{s, chunk, first_h, before_rows};
        const RowTiles<P> inputs{rows, s.inputs, s.x + row * s.inputs, x.to}, before_d{rows, H, states.found(), h.to};
        const RowPanels<P> every_d{rows, G, d_stride, d, panels.to}, shared_d{rows, shared, d_stride, d, panels.to},
            own_d{rows, own, d_stride, d_hidden, hidden_panels.to};
        T* d_x = s.d_x ? s.d_x + row * s.inputs : nullptr;
        divide(member, states);
        divide(member, inputs, before_d, every_d, own_d,
               Product<P>{rows, G, s.inputs, d_stride, s.inputs, d, input.to, nullptr, d_x, false});
        const bool add = at != all.rbegin();
        divide(member, RowProducts<P>{inputs, every_d, d_ih, G, add}, RowProducts<P>{before_d, shared_d, d_hh, G, add},
               RowProducts<P>{before_d, own_d, d_hh + shared, G, add});
      }
    }
    if (!all.empty()) divide(member, Turning<T>{G, s.inputs, G, d_ih, s.d_ih}, Turning<T>{G, H, G, d_hh, s.d_hh});
  });
  for (int64_t k = 0; k < width; ++k) {
    s.sums[k] = 0;
    for (size_t at = static_cast<size_t>(k); at < sums.size(); at += static_cast<size_t>(width)) s.sums[k] += sums[at];
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
