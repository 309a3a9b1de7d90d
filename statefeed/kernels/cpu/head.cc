// The loss of a softmax head with its gradients, in chunks of rows whose probabilities stay in cache.
//   loss = -log softmax(x W^T + b)[target],   e = softmax(x W^T + b) - onehot(target),   d_x = e W,   d_W = e^T x,   d_b = sum e
#include "head.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bulk.h"

namespace statefeed {

namespace {

constexpr int L = lanes<float>;
template <class P>  // rows of one item: a tile of them pays for the weights that pass by, and there are items for many threads
constexpr int64_t few = max_rows<P, bulk_vectors>;

// Rows of logits, and while they are in cache their losses and errors: as rows and as panels.
template <class P>
struct Errors {
  typedef typename P::In In;
  Product<P> logits;  // out: of the errors where nothing is rounded, else of one item's; rows end in padding of a vector at least
  const int64_t* targets;
  float *losses, *sums;  // sums: += column sums of the errors, one row for each item; null: losses only
  In* rows;              // the errors, where they are rounded
  int64_t rows_stride;
  RowPanels<P> panels;

  int64_t items() const { return panel_count(logits.rows, few<P>); }
  void run(int64_t item) const {
    const int64_t first = item * few<P>, last = std::min(first + few<P>, logits.rows), stride = logits.out_stride;
    Product<P> part = logits;
    part.rows = last - first, part.a += first * part.a_stride, part.out += first * stride;
    if constexpr (RowPanels<P>::packed) part.out = scratch<float, Use::gates>(few<P> * stride);
    for (int64_t i = 0; i < part.items(); ++i) part.run(i);
    for (int64_t row = first; row < last; ++row)
      losses[row] = of_row(part.out + (row - first) * stride, targets[row], sums ? sums + item * stride : nullptr);
    if constexpr (RowPanels<P>::packed) {
      if (!sums) return;
      for (int64_t row = first; row < last; ++row) {
        P::round_row(part.out + (row - first) * stride, logits.units, rows + row * rows_stride);
        std::fill(rows + row * rows_stride + (logits.units + 1) / 2, rows + (row + 1) * rows_stride, In(0));
      }
      RowPanels<P> own = panels;
      own.from = part.out - first * stride;
      const int64_t end = last == logits.rows ? own.packed_rows() : last;
      for (int64_t row = first; row < end; row += P::pack)
        for (int64_t p = 0; p < own.count(); ++p) own.put(p, row);
    }
  }

  float of_row(float* e, int64_t target, float* sum_of_rows) const {
    const int64_t width = panel_count(logits.units, L) * L;
    std::fill(e + logits.units, e + width, -1e30f);
    const float right = e[target];
    Vector<float> highest = load(e);
    for (int64_t u = L; u < width; u += L) {
      const Vector<float> value = load(e + u);
      highest = value > highest ? value : highest;
    }
    float most = highest[0];
    for (int k = 1; k < L; ++k) most = std::max(most, highest[k]);
    Vector<float> sum{};
    for (int64_t u = 0; u < width; u += L) {
      const Vector<float> value = exp<float>(load(e + u) - most);
      sum += value;
      store(e + u, value);
    }
    float total = 0;
    for (int k = 0; k < L; ++k) total += sum[k];
    if (sum_of_rows) {
      e[target] -= total;
      const float share = 1 / total;
      for (int64_t u = 0; u < width; u += L) {
        const Vector<float> value = load(e + u) * share;
        store(e + u, value);
        store(sum_of_rows + u, load(sum_of_rows + u) + value);
      }
    }
    return most - right + std::log(total);
  }
};

// d_x = e W, a strip of classes after the other: the weights of one stay in cache while all rows of an item pass by.
template <class P>
struct Strips {
  static constexpr int64_t strip = 512;
  const float* w;
  int64_t inputs, classes;
  typename P::In* packed;

  int64_t count() const { return panel_count(classes, strip); }
  Packing<P> packing(int64_t i) const {
    Packing<P> of{w + i * strip * inputs, 1, inputs, std::min(strip, classes - i * strip), bulk_vectors, true, nullptr};
    of.to = packed + i * panel_count(inputs, of.width()) * of.width() * packed_depth<P>(strip);
    return of;
  }
  int64_t size() const { return packing(0).size() * count(); }
  int64_t items() const { return count(); }
  void run(int64_t item) const {
    const Packing<P> weights = packing(item);
    for (int64_t i = 0; i < weights.items(); ++i) weights.run(i);
  }
};

template <class P>
struct StripProducts {
  const Strips<P>& strips;
  const Errors<P>& errors;
  float* d_x;

  int64_t items() const { return errors.items(); }
  void run(int64_t item) const {
    const int64_t first = item * few<P>, count = std::min(few<P>, errors.logits.rows - first), inputs = strips.inputs;
    for (int64_t i = 0; i < strips.count(); ++i) {
      const Packing<P> weights = strips.packing(i);
      const Product<P, typename P::In> part{
          count, weights.depth, inputs, errors.rows_stride, inputs,
          errors.rows + first * errors.rows_stride + i * Strips<P>::strip / P::pack, weights.to, nullptr, d_x + first * inputs, i > 0};
      for (int64_t k = 0; k < part.items(); ++k) part.run(k);
    }
  }
};

template <class P>
void head_loss(const HeadLoss& s) {
  typedef typename P::In In;
  const int64_t V = s.classes, H = s.inputs, stride = (panel_count(V, 2 * L) + 1) * 2 * L;  // rows a power of two apart share cache sets
  const int64_t most = std::min<int64_t>(bulk_depth, s.rows), slots = panel_count(most, few<P>);
  Packing<P> weights{s.w, 1, V, H, bulk_vectors, false, nullptr};
  weights.to = scratch<In, Use::input_weights>(weights.size());
  Strips<P> strips{s.w, H, V, nullptr};
  if (s.d_w) strips.packed = scratch<In, Use::hidden_weights>(strips.size());
  const int64_t rows_stride = stride / P::pack;
  In* rows = scratch<In, Use::d>((panel_count(most, P::side) * P::side) * rows_stride + bulk_vectors * L);
  float* logits = nullptr;
  if constexpr (!RowPanels<P>::packed) logits = rows;
  std::vector<float> sums(static_cast<size_t>(s.d_w ? slots * stride : 0));
  RowTiles<P> x{most, H, nullptr, nullptr};
  x.to = scratch<In, Use::inputs>(x.size());
  RowPanels<P> panels{most, V, stride, nullptr, nullptr};
  panels.to = scratch<In, Use::panels>(s.d_w ? panels.size() : 0);
  float* turned = scratch<float, Use::weight_gradients>(s.d_w ? H * V : 0);
  with_team<P>(s.rows * V * H, [&](Member& member) {
    divide(member, weights);
    if (s.d_w) divide(member, strips);
    for (int64_t row = 0; row < s.rows; row += bulk_depth) {
      const int64_t count = std::min<int64_t>(bulk_depth, s.rows - row);
      const RowTiles<P> inputs{count, H, s.x + row * H, x.to};
      const Errors<P> errors{{count, H, V, H, stride, s.x + row * H, weights.to, s.bias, logits, false},
                             s.targets + row, s.losses + row, s.d_w ? sums.data() : nullptr, rows, rows_stride,
                             {count, V, stride, logits, panels.to}};
      divide(member, errors, inputs);
      if (!s.d_w) continue;
      divide(member, StripProducts<P>{strips, errors, s.d_x + row * H}, RowProducts<P>{inputs, errors.panels, turned, V, row > 0});
    }
    if (s.d_w && s.rows) divide(member, Turning<float>{V, H, turned, s.d_w});
  });
  if (!s.d_w) return;
  if (s.rows == 0) std::fill(s.d_w, s.d_w + V * H, 0.0f);
  std::fill(s.d_bias, s.d_bias + V, 0.0f);
  for (int64_t i = 0; i < slots; ++i)
    for (int64_t u = 0; u < V; ++u) s.d_bias[u] += sums[static_cast<size_t>(i * stride + u)];
}

}  // namespace

void run_head_loss(const HeadLoss& s) { s.rounded ? head_loss<RoundedFor<float>>(s) : head_loss<Exact<float>>(s); }

}  // namespace statefeed
