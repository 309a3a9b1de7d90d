// Products of odd sizes, through the tiles of this CPU or their model, against loops in double over the same bfloat16
// values.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "../statefeed/backends/cpu/bulk.h"
#include "../statefeed/backends/cpu/tiles.cc"

#if !defined(STATEFEED_AMX_MODEL)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace statefeed {

int64_t thread_count() { return 1; }
void run_parallel(int64_t, void (*)(int64_t, int64_t, void*), void*) {}

namespace {

typedef std::vector<float> Matrix;

std::mt19937 random_bits(0);

Matrix normal(int64_t rows, int64_t columns) {
  std::normal_distribution<float> draw;
  Matrix values(static_cast<size_t>(rows * columns));
  for (float& value : values) value = draw(random_bits);
  return values;
}

// To bfloat16, nearest even, by arithmetic.
double to_bf16(float value) {
  int power;
  const double part = std::frexp(static_cast<double>(value), &power);
  return std::ldexp(std::nearbyint(std::ldexp(part, 8)), power - 8);
}

// Results must not depend on uninitialized memory: every buffer is filled with NaN before it is used.
Matrix nothing(int64_t count) { return Matrix(static_cast<size_t>(count), std::numeric_limits<float>::quiet_NaN()); }
template <class packed_t, Tag tag>
packed_t* poisoned(int64_t count) {
  packed_t* memory = workspace<packed_t, tag>(count);
  std::fill(memory, memory + count, static_cast<packed_t>(0x7fc07fc0));
  return memory;
}

int failures = 0;

void compare(const char* what, int64_t rows, int64_t depth, int64_t units, const Matrix& found,
             const std::vector<double>& sums, const std::vector<double>& sizes) {
  for (size_t i = 0; i < sums.size(); ++i)
    if (!(std::abs(found[i] - sums[i]) <= 1e-6 * (1 + sizes[i]))) {
      std::printf("%s of %ld rows, depth %ld, %ld units: [%zu] is %.9g, not %.9g\n", what, static_cast<long>(rows),
                  static_cast<long>(depth), static_cast<long>(units), i, static_cast<double>(found[i]), sums[i]);
      ++failures;
      return;
    }
}

// sums[i, j] = sum_k left(i, k) right(k, j), and the sums of the absolute values, by which rounding is judged
template <class Left, class Right>
void check(const char* what, int64_t rows, int64_t depth, int64_t units, const Matrix& found, Left left, Right right) {
  std::vector<double> sums(static_cast<size_t>(rows * units)), sizes(sums.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < units; ++j)
      for (int64_t k = 0; k < depth; ++k) {
        const double term = to_bf16(left(i, k)) * to_bf16(right(k, j));
        sums[static_cast<size_t>(i * units + j)] += term, sizes[static_cast<size_t>(i * units + j)] += std::abs(term);
      }
  compare(what, rows, depth, units, found, sums, sizes);
}

template <class Task>
void run(const Task& task) {
  for (int64_t i = 0; i < task.items(); ++i) task.run(i);
}

template <class P>
void inputs_by_weights(int64_t rows, int64_t depth, int64_t units, bool columns, int64_t blocks = 1) {
  const int64_t all_depth = blocks * depth, all_units = blocks * units;
  const Matrix a = normal(rows, all_depth), w = normal(all_units, depth), bias = normal(1, all_units),
               start = normal(rows, all_units);
  PackedWeights<P> weights{.w = w.data(),
                           .gates = 1,
                           .units = units,
                           .depth = depth,
                           .vectors = bulk_vectors,
                           .by_columns = columns,
                           .blocks = blocks};
  weights.to = poisoned<typename P::packed_t, Tag::input_weights>(weights.size());
  run(weights);
  poisoned<typename P::packed_t, Tag::packed_rows>((rows + 32) * (depth + 64));
  auto left = [&](int64_t i, int64_t k) { return a[i * all_depth + k]; };
  auto right = [&](int64_t k, int64_t j) {  // zero outside the blocks
    return k / depth != j / units ? 0.0f : columns ? w[k * units + j % units] : w[j * depth + k % depth];
  };
  Matrix out = nothing(rows * all_units);
  auto multiply = [&](const float* row, bool add) {
    run(Product<P>{.rows = rows,
                   .depth = depth,
                   .units = units,
                   .a_stride = all_depth,
                   .out_stride = all_units,
                   .a = a.data(),
                   .packed = weights.to,
                   .bias = row,
                   .out = out.data(),
                   .add = add,
                   .blocks = blocks});
  };
  multiply(nullptr, false);
  check(columns ? "product with columns" : "product", rows, all_depth, all_units, out, left, right);
  multiply(bias.data(), false);
  for (int64_t i = 0; i < rows * all_units; ++i) out[i] -= bias[i % all_units];
  check("product and a bias", rows, all_depth, all_units, out, left, right);
  out = start;
  multiply(nullptr, true);
  for (int64_t i = 0; i < rows * all_units; ++i) out[i] -= start[i];
  check("product added", rows, all_depth, all_units, out, left, right);
}

template <class P>
void rows_by_rows(int64_t units, int64_t rows, int64_t inputs, int64_t heads = 1, int64_t gates = 1) {
  const int64_t blocks = gates * heads, all_units = blocks * units;
  const Matrix d = normal(rows, all_units), x = normal(rows, heads * inputs);
  Matrix transposed = nothing(inputs * all_units), out = nothing(all_units * inputs);
  RowTiles<P> left{.rows = rows, .units = inputs, .from = x.data(), .blocks = heads};
  RowPanels<P> right{.rows = rows, .units = units, .row_stride = all_units, .from = d.data(), .blocks = blocks};
  left.to = poisoned<typename P::packed_t, Tag::inputs>(left.size());
  right.to = poisoned<typename P::packed_t, Tag::panels>(right.size());
  run(left);
  run(right);
  run(RowProducts<P>{.left = left, .right = right, .out = transposed.data(), .out_stride = all_units, .add = false});
  run(Transpose<float>{
      .units = all_units, .inputs = inputs, .stride = all_units, .from = transposed.data(), .out = out.data()});
  for (int64_t block = 0; block < blocks; ++block) {
    const auto first = out.begin() + block * units * inputs;
    check(
        "product of rows", units, rows, inputs, Matrix(first, first + units * inputs),
        [&](int64_t i, int64_t k) { return d[k * all_units + block * units + i]; },
        [&](int64_t k, int64_t j) { return x[(k * heads + block % heads) * inputs + j]; });
  }
}

// One tile as a step takes it: N gates of a vector of units.
template <class P, int N>
void step(int64_t rows, int64_t depth) {
  constexpr int L = lanes<float>;
  const int64_t units = 2 * L - 3;
  const Matrix h = normal(rows, depth), w = normal(N * units, depth);
  PackedWeights<P> weights{
      .w = w.data(), .gates = N, .units = units, .depth = depth, .vectors = 1, .by_columns = false};
  weights.to = poisoned<typename P::packed_t, Tag::hidden_weights>(weights.size());
  run(weights);
  poisoned<typename P::packed_t, Tag::packed_rows>((rows + 32) * (depth + 64));
  Matrix out = nothing(rows * N * units);
  alignas(64) float sum[tile_size<P, N>];
  int64_t stride = depth;
  const typename P::packed_t* from = P::pack_rows(h.data(), rows, depth, stride);
  for (int64_t p = 0; p < 2; ++p)
    for (int64_t first = 0, count; first < rows; first += count) {
      count = std::min<int64_t>(max_rows<P, N>, rows - first);
      tile_of<P, N>(count, from + first * stride, stride, weights.to + p * weights.panel_size(), packed_depth<P>(depth),
                    {sum, N * L});
      for (int64_t i = 0; i < count; ++i)
        for (int g = 0; g < N; ++g)
          for (int64_t u = p * L; u < std::min<int64_t>(units, (p + 1) * L); ++u)
            out[(first + i) * N * units + g * units + u] = sum[(i * N + g) * L + u - p * L];
    }
  check(
      "step", rows, depth, N * units, out, [&](int64_t i, int64_t k) { return h[i * depth + k]; },
      [&](int64_t k, int64_t j) { return w[j * depth + k]; });
}

}  // namespace
}  // namespace statefeed

int main() {
  using namespace statefeed;
  using P = Bf16For<float>;
#if !defined(STATEFEED_AMX_MODEL)
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return std::printf("Linux refuses the tiles\n");
  [[maybe_unused]] constexpr long amx_products = 0, amx_held = 0;
#endif
  {
    P::TileConfigGuard guard;
    for (int64_t rows : {1, 15, 16, 17, 33, 70})
      for (int64_t depth : {1, 2, 31, 32, 33, 95}) {
        step<P, 2>(rows, depth), step<P, 3>(rows, depth), step<P, 4>(rows, depth);
        for (int64_t units : {1, 31, 32, 49})
          for (bool columns : {false, true}) inputs_by_weights<P>(rows, depth, units, columns);
      }
    for (int64_t units : {1, 15, 17, 33, 129})
      for (int64_t rows : {1, 2, 31, 33, 383, 385, 800})
        for (int64_t inputs : {1, 17, 33}) rows_by_rows<P>(units, rows, inputs);
    for (int64_t rows : {1, 17, 70})
      for (int64_t units : {1, 5, 32, 35}) {  // heads of a layer
        for (bool columns : {false, true}) inputs_by_weights<P>(rows, units, units, columns, 3);
        rows_by_rows<P>(units, rows, units, 3, 2);
      }
  }
  std::printf("%d wrong, %ld products, %ld held\n", failures, static_cast<long>(amx_products),
              static_cast<long>(amx_held));
  return failures != 0;
}
