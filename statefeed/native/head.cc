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

inline float horizontal(Vector<float> v, auto of_two) {
  alignas(vector_bytes) float all[L];
  store(all, v);
  for (int half = L / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) all[k] = of_two(all[k], all[k + half]);
  return all[0];
}

// Rows of the loss with all gradients but that of the weights, for which the errors are left as panels.
template <class P>
struct Rows {
  typedef typename P::In In;
  static constexpr int64_t tile = max_rows<P, bulk_vectors>, pair = 2 * L;
  const HeadLoss& s;
  int64_t first_row, rows, members;
  const In* weights;
  const Strips<P>& strips;
  int64_t stride;  // of sums
  float* sums;     // += column sums of the errors, one row for each tile of rows; null: losses only
  OwnPanels<P> errors;

  // Whole tiles, and an item for every member.
  int64_t item_rows() const { return std::min(block, panel_count(panel_count(rows, tile), members) * tile); }
  int64_t items() const { return panel_count(rows, item_rows()); }

  void run(int64_t item) const {
    const int64_t first = item * item_rows(), count = std::min(item_rows(), rows - first);
    In* e = sums ? scratch<In, Use::gates>(place(strips.items(), 0, count)) : nullptr;
    Largest* largest = scratch<Largest, Use::states>(count * strips.items());
    float* right = scratch<float, Use::states_before>(count);
    exponentials(first, count, e, largest, right);
    for (int64_t r = 0; r < count; ++r) s.losses[first_row + first + r] = finish(largest + r * strips.items(), right[r]);
    if (sums) gradients(first, count, e, largest, right);
  }

 private:
  // Where an item keeps a row's exponentials of a strip: in the order in which they are read.
  int64_t place(int64_t strip, int64_t row, int64_t count) const { return (strip * count + row) * strips.width() / P::pack; }
  // A row's target, counted from the first class of a strip; outside of it, it is none of its classes.
  int64_t target(int64_t row, int64_t unit) const { return s.targets[first_row + row] - unit; }

  // e = exp(x W^T + b - m), m the largest of a row's strip; right: the logits of the targets.
  void exponentials(int64_t first, int64_t count, In* e, Largest* largest, float* right) const {
    int64_t x_stride = s.inputs;
    const In* x = P::rows(s.x + (first_row + first) * s.inputs, count, s.inputs, x_stride);
    const int64_t panel = packed_depth<P>(s.inputs) * pair, logit_stride = strips.width() + L;
    float* logits = scratch<float, Use::d>(count * logit_stride);
    for (int64_t i = 0; i < strips.items(); ++i) {
      const int64_t unit = i * strips.width(), inside = strips.inside(i);
      const Product<P, In> product{count, s.inputs, inside, x_stride, logit_stride, x, weights + unit / pair * panel,
                                   s.bias + unit, logits, false};
      for (int64_t k = 0; k < product.items(); ++k) product.run(k);
      for (int64_t r = 0; r < count; ++r) {
        float* row = logits + r * logit_stride;
        if (const int64_t t = target(first + r, unit); t >= 0 && t < inside) right[r] = row[t];
        largest[r * strips.items() + i] = exponentials_of(row, inside, e ? e + place(i, r, count) : nullptr);
      }
    }
  }

  static Largest exponentials_of(float* logits, int64_t inside, In* to) {
    const int64_t width = panel_count(inside, pair) * pair;
    std::fill(logits + inside, logits + width, -std::numeric_limits<float>::max());
    auto larger = [](auto a, auto b) { return a > b ? a : b; };
    Vector<float> first = load(logits), second = load(logits + L);
    for (int64_t u = pair; u < width; u += pair)
      first = larger(load(logits + u), first), second = larger(load(logits + u + L), second);
    const float most = horizontal(larger(second, first), larger);
    Vector<float> sum{}, other_sum{};
    for (int64_t u = 0; u < width; u += pair) {
      first = exp<float>(load(logits + u) - most), second = exp<float>(load(logits + u + L) - most);
      sum += first, other_sum += second;
      if (to) P::put_pair(to + u / P::pack, first, second);
    }
    for (int64_t u = inside; to && u < width; ++u) P::put(to, u, 0);
    return {most, horizontal(sum + other_sum, [](float a, float b) { return a + b; })};
  }

  // The loss of a row; `right` becomes the target's error, `sum` the factor that makes probabilities of exponentials.
  float finish(Largest* of, float& right) const {
    const int64_t count = strips.items();
    float most = of[0].logit, total = 0;
    for (int64_t i = 1; i < count; ++i) most = std::max(most, of[i].logit);
    for (int64_t i = 0; i < count; ++i) total += of[i].sum * std::exp(of[i].logit - most);
    for (int64_t i = 0; i < count; ++i) of[i].sum = std::exp(of[i].logit - most) / total;
    const float loss = most - right + std::log(total);
    right = std::expm1(-loss);
    return loss;
  }

  void gradients(int64_t first, int64_t count, In* e, const Largest* largest, const float* right) const {
    for (int64_t i = 0; i < strips.items(); ++i) {
      const int64_t unit = i * strips.width(), inside = strips.inside(i), width = panel_count(inside, pair) * pair;
      const int64_t a_stride = strips.width() / P::pack + L;  // rows a power of two apart share cache sets
      In* a = scratch<In, Use::rounded>((count + P::side) * a_stride);
      for (int64_t r = 0; r < count; ++r) {
        float* sum = sums + (first + r) / tile * stride + unit;
        errors_of(e + place(i, r, count), largest[r * strips.items() + i].sum, width, a + r * a_stride, sum);
        if (const int64_t t = target(first + r, unit); t >= 0 && t < inside) P::put(a + r * a_stride, t, right[r]), sum[t] -= 1;
      }
      const Packing<P> packed = strips.packing(i);
      const Product<P, In> d_x{count, inside, s.inputs, a_stride, s.inputs, a, packed.to, nullptr,
                               s.d_x + (first_row + first) * s.inputs, i > 0};
      for (int64_t k = 0; k < d_x.items(); ++k) d_x.run(k);
      const int64_t end = first + count == rows ? errors.packed_rows() - first : count;
      for (int64_t r = 0; r < end; r += P::pack)
        for (int64_t u = 0; u < width; u += pair) {
          const In* above = a + r * a_stride + u / P::pack;
          errors.put((unit + u) / pair, first + r, r < count ? above : nullptr, r + 1 < count ? above + a_stride : nullptr);
        }
    }
  }

  static void errors_of(const In* e, float factor, int64_t width, In* to, float* sum) {
    for (int64_t u = 0; u < width; u += pair) {
      Vector<float> first, second;
      P::pair(e + u / P::pack, first, second);
      first *= factor, second *= factor;
      P::put_pair(to + u / P::pack, first, second);
      store(sum + u, load(sum + u) + first);
      store(sum + u + L, load(sum + u + L) + second);
    }
  }
};

template <class P>
void head_loss(const HeadLoss& s) {
  typedef typename P::In In;
  const int64_t V = s.classes, H = s.inputs, stride = panel_count(V, 2 * L) * 2 * L;
  const int64_t most = std::min<int64_t>(bulk_depth, s.rows), slots = panel_count(most, Rows<P>::tile);
  Packing<P> weights{s.w, 1, V, H, bulk_vectors, false, nullptr};
  weights.to = scratch<In, Use::input_weights>(weights.size());
  Strips<P> strips{s.w, H, V, nullptr};
  if (s.d_w) strips.packed = scratch<In, Use::hidden_weights>(strips.size());
  OwnPanels<P> panels{most, V, nullptr};
  if (s.d_w) panels.to = scratch<In, Use::panels>(panels.size());
  std::vector<float> sums(static_cast<size_t>(s.d_w ? slots * stride : 0));
  RowTiles<P> x{most, H, nullptr, nullptr};
  x.to = scratch<In, Use::inputs>(x.size());
  const int64_t turned_stride = panel_count(V, L) * L;  // whole cache lines
  float* turned = scratch<float, Use::weight_gradients>(s.d_w ? H * turned_stride : 0);
  with_team<P>(s.rows * V * H, [&](Member& member) {
    divide(member, weights);
    if (s.d_w) divide(member, strips);
    for (int64_t row = 0; row < s.rows; row += bulk_depth) {
      const int64_t count = std::min<int64_t>(bulk_depth, s.rows - row);
      const RowTiles<P> inputs{count, H, s.x + row * H, x.to};
      const Rows<P> rows{s, row, count, member.ranks(), weights.to, strips, stride, s.d_w ? sums.data() : nullptr,
                         {count, V, panels.to}};
      divide(member, rows, inputs);
      if (s.d_w) divide(member, RowProducts<P, OwnPanels<P>>{inputs, rows.errors, turned, turned_stride, row > 0});
    }
    if (s.d_w && s.rows) divide(member, Turning<float>{V, H, turned_stride, turned, s.d_w});
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
