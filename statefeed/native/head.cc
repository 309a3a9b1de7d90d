// The loss of a softmax head with its gradients, block of rows by block of rows, each in strips of classes.
//   loss = -log softmax(x W^T + b)[target],   error = softmax(x W^T + b) - onehot(target)
//   grad_x = error W,   grad_W = error^T x,   grad_b = sum error
// A strip's weights, logits and errors are in cache while they are used. Between the two passes over the strips a row
// stores exp(logit - m), m the largest logit of the row in that strip: what is missing is one factor per row and strip.
#include "head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bulk.h"

namespace statefeed {

namespace {

constexpr int L = lanes<float>;
constexpr int64_t pair = 2 * L;
constexpr int64_t block = 192;  // rows per pass over the weights, which come from outside the cache

// Weights (classes, inputs) in strips of classes, each packed for products from the right: error W. A task: an item is
// a strip.
template <ProductTraits P>
struct Strips {
  const float* w;
  int64_t inputs, classes;
  typename P::packed_t* packed = nullptr;

  // 2^17 weights, half a megabyte in float32, so that a strip stays in the second-level cache; whole vectors.
  int64_t width() const { return std::clamp<int64_t>((int64_t{1} << 17) / inputs / 64 * 64, 64, 512); }
  int64_t inside(int64_t i) const { return std::min(width(), classes - i * width()); }
  PackedWeights<P> weights(int64_t i) const {
    PackedWeights<P> strip{.w = w + i * width() * inputs,
                           .gates = 1,
                           .units = inputs,
                           .depth = inside(i),
                           .vectors = bulk_vectors,
                           .by_columns = true};
    strip.to = packed + i * panel_count(inputs, strip.width()) * strip.width() * packed_depth<P>(width());
    return strip;
  }
  int64_t size() const {
    const PackedWeights<P> first{
        .w = w, .gates = 1, .units = inputs, .depth = inside(0), .vectors = bulk_vectors, .by_columns = true};
    return first.size() * items();
  }
  int64_t items() const { return panel_count(classes, width()); }
  void run(int64_t item) const {
    const PackedWeights<P> strip = weights(item);
    for (int64_t i = 0; i < strip.items(); ++i) strip.run(i);
  }
};

// Of one row in one strip: the largest logit m, and the sum of exp(logit - m).
struct StripMaximum {
  float logit, sum;
};

inline float horizontal(Vector<float> v, auto of_two) {
  alignas(vector_bytes) float all[L];
  store(all, v);
  for (int half = L / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) all[k] = of_two(all[k], all[k + half]);
  return all[0];
}

// Losses and all gradients but that of the weights, for which the errors are stored as panels. A task: an item is some
// rows.
template <ProductTraits P>
struct LossRows {
  using packed_t = typename P::packed_t;
  static constexpr int64_t tile = max_rows<P, bulk_vectors>;
  const HeadLossArgs& s;
  int64_t first_row, rows, ranks;
  const packed_t* weights;
  const Strips<P>& strips;
  int64_t sums_stride;
  float* sums;  // += column sums of the errors, one row for each tile of rows; null: losses only
  PrepackedPanels<P> errors;

  // Whole tiles, and an item for every worker.
  int64_t item_rows() const { return std::min(block, panel_count(panel_count(rows, tile), ranks) * tile); }
  int64_t items() const { return panel_count(rows, item_rows()); }

  void run(int64_t item) const {
    const int64_t first = item * item_rows(), count = std::min(item_rows(), rows - first);
    packed_t* e = sums ? workspace<packed_t, Tag::exponentials>(place(strips.items(), 0, count)) : nullptr;
    StripMaximum* maxima = workspace<StripMaximum, Tag::strip_maxima>(count * strips.items());
    float* target_values = workspace<float, Tag::target_logits>(count);
    exponentials(first, count, e, maxima, target_values);
    for (int64_t r = 0; r < count; ++r)
      s.losses[first_row + first + r] = finish(maxima + r * strips.items(), target_values[r]);
    if (sums) gradients(first, count, e, maxima, target_values);
  }

 private:
  // Where the exponentials of a row and strip lie: in the order in which they are read.
  int64_t place(int64_t strip, int64_t row, int64_t count) const {
    return (strip * count + row) * strips.width() / P::k_pack;
  }
  // A row's target, counted from the first class of a strip; negative or too large if it is in another strip.
  int64_t target(int64_t row, int64_t unit) const { return s.targets[first_row + row] - unit; }

  // e = exp(x W^T + b - m), m the largest of a row's strip; `target_values` becomes the logits of the targets.
  void exponentials(int64_t first, int64_t count, packed_t* e, StripMaximum* maxima, float* target_values) const {
    int64_t x_stride = s.inputs;
    const packed_t* x = P::pack_rows(s.x + (first_row + first) * s.inputs, count, s.inputs, x_stride);
    const int64_t panel = packed_depth<P>(s.inputs) * pair;
    const int64_t logit_stride = strips.width() + L;  // rows a power of two apart share cache sets
    float* logits = workspace<float, Tag::logits>(count * logit_stride);
    for (int64_t i = 0; i < strips.items(); ++i) {
      const int64_t unit = i * strips.width(), inside = strips.inside(i);
      const Product<P, packed_t> product{.rows = count,
                                         .depth = s.inputs,
                                         .units = inside,
                                         .a_stride = x_stride,
                                         .out_stride = logit_stride,
                                         .a = x,
                                         .packed = weights + unit / pair * panel,
                                         .bias = s.bias + unit,
                                         .out = logits};
      for (int64_t k = 0; k < product.items(); ++k) product.run(k);
      for (int64_t r = 0; r < count; ++r) {
        float* row = logits + r * logit_stride;
        if (const int64_t t = target(first + r, unit); t >= 0 && t < inside) target_values[r] = row[t];
        maxima[r * strips.items() + i] = exponentials_of(row, inside, e ? e + place(i, r, count) : nullptr);
      }
    }
  }

  static StripMaximum exponentials_of(float* logits, int64_t inside, packed_t* to) {
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
      if (to) P::store_pair(to + u / P::k_pack, first, second);
    }
    for (int64_t u = inside; to && u < width; ++u) P::store_one(to, u, 0);
    return {.logit = most, .sum = horizontal(sum + other_sum, [](float a, float b) { return a + b; })};
  }

  // The loss of a row. `target_value`, its target's logit, becomes the target's error; the sum of every strip becomes
  // the factor that makes probabilities of its exponentials.
  float finish(StripMaximum* of, float& target_value) const {
    const int64_t count = strips.items();
    float most = of[0].logit, total = 0;
    for (int64_t i = 1; i < count; ++i) most = std::max(most, of[i].logit);
    for (int64_t i = 0; i < count; ++i) total += of[i].sum * std::exp(of[i].logit - most);
    for (int64_t i = 0; i < count; ++i) of[i].sum = std::exp(of[i].logit - most) / total;
    const float loss = most - target_value + std::log(total);
    target_value = std::expm1(-loss);
    return loss;
  }

  void gradients(int64_t first, int64_t count, packed_t* e, const StripMaximum* maxima,
                 const float* target_errors) const {
    for (int64_t i = 0; i < strips.items(); ++i) {
      const int64_t unit = i * strips.width(), inside = strips.inside(i), width = panel_count(inside, pair) * pair;
      const int64_t a_stride = strips.width() / P::k_pack + L;  // rows a power of two apart share cache sets
      packed_t* a = workspace<packed_t, Tag::packed_errors>((count + P::tile_rows) * a_stride);
      for (int64_t r = 0; r < count; ++r) {
        float* sum = sums + (first + r) / tile * sums_stride + unit;
        errors_of(e + place(i, r, count), maxima[r * strips.items() + i].sum, width, a + r * a_stride, sum);
        if (const int64_t t = target(first + r, unit); t >= 0 && t < inside)
          P::store_one(a + r * a_stride, t, target_errors[r]), sum[t] -= 1;
      }
      const PackedWeights<P> packed = strips.weights(i);
      const Product<P, packed_t> grad_x{.rows = count,
                                        .depth = inside,
                                        .units = s.inputs,
                                        .a_stride = a_stride,
                                        .out_stride = s.inputs,
                                        .a = a,
                                        .packed = packed.to,
                                        .out = s.grad_x + (first_row + first) * s.inputs,
                                        .add = i > 0};
      for (int64_t k = 0; k < grad_x.items(); ++k) grad_x.run(k);
      const int64_t end = first + count == rows ? errors.packed_rows() - first : count;
      for (int64_t r = 0; r < end; r += P::k_pack)
        for (int64_t u = 0; u < width; u += pair) {
          const packed_t* above = a + r * a_stride + u / P::k_pack;
          errors.store_rows((unit + u) / pair, first + r, r < count ? above : nullptr,
                            r + 1 < count ? above + a_stride : nullptr);
        }
    }
  }

  static void errors_of(const packed_t* e, float factor, int64_t width, packed_t* to, float* sum) {
    for (int64_t u = 0; u < width; u += pair) {
      Vector<float> first, second;
      P::load_pair(e + u / P::k_pack, first, second);
      first *= factor, second *= factor;
      P::store_pair(to + u / P::k_pack, first, second);
      store(sum + u, load(sum + u) + first);
      store(sum + u + L, load(sum + u + L) + second);
    }
  }
};

template <ProductTraits P>
void head_loss(const HeadLossArgs& s) {
  using packed_t = typename P::packed_t;
  const int64_t V = s.classes, H = s.inputs, sums_stride = panel_count(V, pair) * pair;
  const int64_t most = std::min<int64_t>(bulk_depth, s.rows), slots = panel_count(most, LossRows<P>::tile);
  PackedWeights<P> weights{.w = s.w, .gates = 1, .units = V, .depth = H, .vectors = bulk_vectors, .by_columns = false};
  weights.to = workspace<packed_t, Tag::input_weights>(weights.size());
  Strips<P> strips{.w = s.w, .inputs = H, .classes = V};
  if (s.grad_w) strips.packed = workspace<packed_t, Tag::hidden_weights>(strips.size());
  PrepackedPanels<P> panels{.rows = most, .units = V};
  if (s.grad_w) panels.to = workspace<packed_t, Tag::panels>(panels.size());
  std::vector<float> sums(static_cast<size_t>(s.grad_w ? slots * sums_stride : 0));
  RowTiles<P> x{.rows = most, .units = H, .from = nullptr};
  x.to = workspace<packed_t, Tag::inputs>(x.size());
  const int64_t transposed_stride = panel_count(V, L) * L;  // whole cache lines
  float* transposed = workspace<float, Tag::weight_grads>(s.grad_w ? H * transposed_stride : 0);
  run_team<P>(s.rows * V * H, [&](Worker& worker) {
    parallel_for(worker, weights);
    if (s.grad_w) parallel_for(worker, strips);
    for (int64_t row = 0; row < s.rows; row += bulk_depth) {
      const int64_t count = std::min<int64_t>(bulk_depth, s.rows - row);
      const RowTiles<P> inputs{.rows = count, .units = H, .from = s.x + row * H, .to = x.to};
      const LossRows<P> loss_rows{.s = s,
                                  .first_row = row,
                                  .rows = count,
                                  .ranks = worker.ranks(),
                                  .weights = weights.to,
                                  .strips = strips,
                                  .sums_stride = sums_stride,
                                  .sums = s.grad_w ? sums.data() : nullptr,
                                  .errors = {.rows = count, .units = V, .to = panels.to}};
      parallel_for(worker, loss_rows, inputs);
      if (s.grad_w)
        parallel_for(worker, RowProducts<P, PrepackedPanels<P>>{.left = inputs,
                                                                .right = loss_rows.errors,
                                                                .out = transposed,
                                                                .out_stride = transposed_stride,
                                                                .add = row > 0});
    }
    if (s.grad_w && s.rows)
      parallel_for(
          worker,
          Transpose<float>{.units = V, .inputs = H, .stride = transposed_stride, .from = transposed, .out = s.grad_w});
  });
  if (!s.grad_w) return;
  if (s.rows == 0) std::fill(s.grad_w, s.grad_w + V * H, 0.0f);
  std::fill(s.grad_bias, s.grad_bias + V, 0.0f);
  for (int64_t i = 0; i < slots; ++i)
    for (int64_t u = 0; u < V; ++u) s.grad_bias[u] += sums[static_cast<size_t>(i * sums_stride + u)];
}

}  // namespace

void run_head_loss(const HeadLossArgs& s) { s.bf16 ? head_loss<Bf16For<float>>(s) : head_loss<Plain<float>>(s); }

}  // namespace statefeed
