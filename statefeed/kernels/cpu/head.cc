// The loss of a softmax head with its gradients, a block of rows after the other, each in strips of classes.
//   loss = -log softmax(x W^T + b)[target],   e = softmax(x W^T + b) - onehot(target),   d_x = e W,   d_W = e^T x,   d_b = sum e
// A strip's weights, logits and errors are in cache while something is done with them; between the two passes over the
// strips a row keeps exp(logit - m) with the largest logit m of its strip: the rest is one factor for every strip.
#include "head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bulk.h"

namespace statefeed {

namespace {

constexpr int L = lanes<float>;
constexpr int64_t block = 192;  // rows for which the weights pass by once: these come from outside the cache

// Weights (classes, inputs) in strips of classes, each packed for products with it from the right: e W.
template <class P>
struct Strips {
  const float* w;
  int64_t inputs, classes;
  typename P::In* packed;

  int64_t width() const { return std::clamp<int64_t>((int64_t{1} << 17) / inputs / 64 * 64, 64, 512); }
  int64_t inside(int64_t i) const { return std::min(width(), classes - i * width()); }
  Packing<P> packing(int64_t i) const {
    Packing<P> of{w + i * width() * inputs, 1, inputs, inside(i), bulk_vectors, true, nullptr};
    of.to = packed + i * panel_count(inputs, of.width()) * of.width() * packed_depth<P>(width());
    return of;
  }
  int64_t size() const { return packing(0).size() * items(); }
  int64_t items() const { return panel_count(classes, width()); }
  void run(int64_t item) const {
    const Packing<P> weights = packing(item);
    for (int64_t i = 0; i < weights.items(); ++i) weights.run(i);
  }
};

struct Largest {
  float logit, sum;  // of a strip; of exp(logit - the largest)
};

// Rows of the loss with all gradients but that of the weights: it takes the errors, as panels, from what this leaves.
template <class P>
struct Rows {
  typedef typename P::In In;
  static constexpr int64_t tile = max_rows<P, bulk_vectors>;
  const HeadLoss& s;
  int64_t first_row, rows, members;
  const In* weights;
  const Strips<P>& strips;
  int64_t stride;
  float* errors;  // rows of `stride`, the padding a vector at least; where they are rounded, or not wanted: of one item
  float* sums;    // += column sums of the errors, one row for each tile of rows; null: losses only
  RowPanels<P> panels;

  // Whole tiles, and an item for every member.
  int64_t item_rows() const { return std::min(block, panel_count(panel_count(rows, tile), members) * tile); }
  int64_t items() const { return panel_count(rows, item_rows()); }

  void run(int64_t item) const {
    const int64_t first = item * item_rows(), count = std::min(item_rows(), rows - first);
    float* e = errors ? errors + first * stride : scratch<float, Use::gates>(count * stride);
    Largest* largest = scratch<Largest, Use::states>(count * strips.items());
    float* right = scratch<float, Use::states_before>(count);
    exponentials(first, count, e, largest, right);
    for (int64_t r = 0; r < count; ++r) s.losses[first_row + first + r] = finish(largest + r * strips.items(), right[r]);
    if (sums) gradients(first, count, e, largest);
  }

 private:
  // e = exp(x W^T + b - m), m the largest of a row's strip; right: the logits of the targets.
  void exponentials(int64_t first, int64_t count, float* e, Largest* largest, float* right) const {
    int64_t x_stride = s.inputs;
    const In* x = P::rows(s.x + (first_row + first) * s.inputs, count, s.inputs, x_stride);
    const int64_t panel = packed_depth<P>(s.inputs) * bulk_vectors * L;
    for (int64_t i = 0; i < strips.items(); ++i) {
      const int64_t unit = i * strips.width(), inside = strips.inside(i);
      const Product<P, In> logits{count, s.inputs, inside, x_stride, stride, x, weights + unit / (bulk_vectors * L) * panel,
                                  s.bias + unit, e + unit, false};
      for (int64_t k = 0; k < logits.items(); ++k) logits.run(k);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t target = s.targets[first_row + first + r] - unit;
        if (target >= 0 && target < inside) right[r] = e[r * stride + unit + target];
        largest[r * strips.items() + i] = exponentials_of(e + r * stride + unit, inside);
      }
    }
  }

  static Largest exponentials_of(float* e, int64_t inside) {
    const int64_t width = panel_count(inside, L) * L;
    std::fill(e + inside, e + width, -std::numeric_limits<float>::max());
    Vector<float> highest = load(e);
    for (int64_t u = L; u < width; u += L) {
      const Vector<float> value = load(e + u);
      highest = value > highest ? value : highest;
    }
    Largest of{highest[0], 0};
    for (int k = 1; k < L; ++k) of.logit = std::max(of.logit, highest[k]);
    Vector<float> sum{};
    for (int64_t u = 0; u < width; u += L) {
      const Vector<float> value = exp<float>(load(e + u) - of.logit);
      sum += value;
      store(e + u, value);
    }
    std::fill(e + inside, e + width, 0.0f);
    for (int k = 0; k < L; ++k) of.sum += sum[k];
    return of;
  }

  // The loss of a row; `sum` becomes the factor that makes probabilities of a strip's exponentials.
  float finish(Largest* of, float right) const {
    const int64_t count = strips.items();
    float most = of[0].logit, total = 0;
    for (int64_t i = 1; i < count; ++i) most = std::max(most, of[i].logit);
    for (int64_t i = 0; i < count; ++i) total += of[i].sum * std::exp(of[i].logit - most);
    for (int64_t i = 0; i < count; ++i) of[i].sum = std::exp(of[i].logit - most) / total;
    return most - right + std::log(total);
  }

  void gradients(int64_t first, int64_t count, const float* e, const Largest* largest) const {
    constexpr bool packed = RowPanels<P>::packed;
    for (int64_t i = 0; i < strips.items(); ++i) {
      const int64_t unit = i * strips.width(), inside = strips.inside(i);
      const int64_t to_stride = packed ? strips.width() + L : stride;  // rows a power of two apart share cache sets
      float* to = packed ? scratch<float, Use::d>(count * to_stride) : errors + first * stride + unit;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t target = s.targets[first_row + first + r] - unit;
        errors_of(e + r * stride + unit, largest[r * strips.items() + i].sum, target, inside, to + r * to_stride,
                  sums + (first + r) / tile * stride + unit);
      }
      int64_t a_stride = to_stride;
      const In* a = P::rows(to, count, inside, a_stride);
      const Packing<P> right = strips.packing(i);
      const Product<P, In> d_x{count, inside, s.inputs, a_stride, s.inputs, a, right.to, nullptr,
                               s.d_x + (first_row + first) * s.inputs, i > 0};
      for (int64_t k = 0; k < d_x.items(); ++k) d_x.run(k);
      if constexpr (packed) {
        RowPanels<P> own = panels;
        own.from = to - first * to_stride - unit, own.row_stride = to_stride;
        const int64_t end = first + count == rows ? own.packed_rows() : first + count;
        for (int64_t row = first; row < end; row += P::pack)
          for (int64_t p = unit / (bulk_vectors * L); p * bulk_vectors * L < unit + inside; ++p) own.put(p, row);
      }
    }
  }

  static void errors_of(const float* e, float factor, int64_t target, int64_t inside, float* to, float* sum_of_rows) {
    const int64_t width = panel_count(inside, L) * L;
    for (int64_t u = 0; u < width; u += L) store(to + u, load(e + u) * factor);
    if (target >= 0 && target < inside) to[target] -= 1;
    for (int64_t u = 0; u < width; u += L) store(sum_of_rows + u, load(sum_of_rows + u) + load(to + u));
  }
};

template <class P>
void head_loss(const HeadLoss& s) {
  typedef typename P::In In;
  const int64_t V = s.classes, H = s.inputs, stride = (panel_count(V, 2 * L) + 1) * 2 * L;  // rows a power of two apart share cache sets
  const int64_t most = std::min<int64_t>(bulk_depth, s.rows), slots = panel_count(most, Rows<P>::tile);
  Packing<P> weights{s.w, 1, V, H, bulk_vectors, false, nullptr};
  weights.to = scratch<In, Use::input_weights>(weights.size());
  Strips<P> strips{s.w, H, V, nullptr};
  if (s.d_w) strips.packed = scratch<In, Use::hidden_weights>(strips.size());
  float* errors = nullptr;
  if (s.d_w && !RowPanels<P>::packed) errors = scratch<float, Use::panels>(most * stride + bulk_vectors * L);
  std::vector<float> sums(static_cast<size_t>(s.d_w ? slots * stride : 0));
  RowTiles<P> x{most, H, nullptr, nullptr};
  x.to = scratch<In, Use::inputs>(x.size());
  RowPanels<P> panels{most, V, stride, nullptr, nullptr};
  if (s.d_w && RowPanels<P>::packed) panels.to = scratch<In, Use::hidden_panels>(panels.size());
  float* turned = scratch<float, Use::weight_gradients>(s.d_w ? H * V : 0);
  with_team<P>(s.rows * V * H, [&](Member& member) {
    divide(member, weights);
    if (s.d_w) divide(member, strips);
    for (int64_t row = 0; row < s.rows; row += bulk_depth) {
      const int64_t count = std::min<int64_t>(bulk_depth, s.rows - row);
      const RowTiles<P> inputs{count, H, s.x + row * H, x.to};
      const Rows<P> rows{s, row, count, member.ranks(), weights.to, strips, stride, errors, s.d_w ? sums.data() : nullptr,
                         {count, V, stride, errors, panels.to}};
      divide(member, rows, inputs);
      if (s.d_w) divide(member, RowProducts<P>{inputs, rows.panels, turned, V, row > 0});
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
