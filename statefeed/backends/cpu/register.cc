// The operators as torch sees them, through its stable ABI: checks, then arguments with names, then the kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "head.h"
#include "layer.h"
#include "shapes.h"
#include "threads.h"
#include "traits.h"

namespace statefeed {

int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

void run_parallel(int64_t ranks, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, ranks, 1, body, context));
}

namespace {

template <class Body>
void with_dtype(const Checks& checks, Body body) {
  checks.is_double() ? body(double{}) : body(float{});
}

template <class T>
LayerArgs<T> layer_args(const CellEntry& cell, const StepRange& range, bool bf16, const Tensor& x, const Tensor& w_ih,
                        const Tensor& w_hh, const OptionalTensor& w_hr) {
  return {.cell = &cell,
          .range = range,
          .inputs = w_ih.dim() == 1 ? 0 : x.size(1),
          .heads = range.output / w_hh.size(1),
          .bf16 = bf16,
          .x = data<T>(x),
          .w_ih = data<T>(w_ih),
          .w_hh = data<T>(w_hh),
          .w_hr = data<T>(w_hr)};
}

// Gates, shared gates, states, constants among these, and values saved per row and unit; nothing for a cell that has no
// kernel.
std::vector<int64_t> cell_sizes(StringHandle cell_name) {
  const Name name(cell_name);
  for (const CellEntry* cell : cell_table)
    if (cell->name == name.view())
      return {cell->gates, cell->shared_gates, cell->states + cell->constant_states, cell->constant_states,
              cell->gates > 1 ? cell->gates + cell->aux_parts : 0};
  return {};
}

void forward(StringHandle cell_name, bool bf16, const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
             const OptionalTensor& b_ih, const OptionalTensor& b_hh, const Tensor& h0,
             const OptionalTensor& batch_sizes, OptionalTensor gates, OptionalTensor aux, Tensor y, Tensor h,
             OptionalTensor c, const OptionalTensor& w_hr, const OptionalTensor& c0) {
  const CellEntry& cell = find_cell(Name(cell_name).view());
  const Checks checks("layer_forward", y);
  checks.dims("x", x, 2);
  const StepRange range = checked_range(checks, x.size(0), checked_hidden(checks, cell, h0, w_hr), h0, batch_sizes);
  const auto [N, I, B, H, O, G, S, columns] = checked_input(checks, cell, range, x, w_ih, w_hh, w_hr);
  checks.optional("b_ih", b_ih, {G});
  checks.optional("b_hh", b_hh, b_ih.has_value(), "with b_ih", {G});
  check_saved(checks, cell, N, H, gates, aux, gates || aux);
  checks.tensor("y", y, {N, O});
  checks.tensor("h", h, {B, O});
  check_c(checks, "c", cell, range, c);
  check_c(checks, "c0", cell, range, c0);
  with_dtype(checks, [&](auto type) {
    using T = decltype(type);
    if (c) std::copy_n(data<T>(c0), c->numel(), data<T>(c));
    layer_forward<T>({.layer = layer_args<T>(cell, range, bf16, x, w_ih, w_hh, w_hr),
                      .b_ih = data<T>(b_ih),
                      .b_hh = data<T>(b_hh),
                      .h0 = data<T>(h0),
                      .gates = cell.gates == 1 ? data<T>(y) : data<T>(gates),
                      .aux = data<T>(aux),
                      .y = data<T>(y),
                      .h = data<T>(h),
                      .c = data<T>(c)});
  });
}

void backward(StringHandle cell_name, StringHandle rule_name, int64_t corrections, bool bf16, const Tensor& x,
              const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& gates, const OptionalTensor& aux,
              const Tensor& y, const Tensor& h0, const OptionalTensor& c0, const Tensor& grad_y,
              const Tensor& grad_final, const OptionalTensor& diagonal, const OptionalTensor& batch_sizes, Tensor carry,
              OptionalTensor grad_x, Tensor grad_w_ih, Tensor grad_w_hh, OptionalTensor grad_b_ih,
              OptionalTensor grad_b_hh, OptionalTensor residual, const OptionalTensor& w_hr, OptionalTensor grad_w_hr) {
  const Name of_cell(cell_name), of_rule(rule_name);
  const CellEntry& cell = find_cell(of_cell.view());
  const Rule rule = find_rule(of_rule.view());
  const Checks checks("layer_backward", y);
  checks.dims("x", x, 2);
  const StepRange range = checked_range(checks, x.size(0), checked_hidden(checks, cell, h0, w_hr), h0, batch_sizes);
  const auto [N, I, B, H, O, G, S, columns] = checked_input(checks, cell, range, x, w_ih, w_hh, w_hr);
  check_saved(checks, cell, N, H, gates, aux, true);
  checks.tensor("y", y, {N, O});
  check_c(checks, "c0", cell, range, c0);
  checks.tensor("grad_y", grad_y, {N, O});
  checks.tensor("grad_final", grad_final, {B, S});
  const char* rules = "for the rules stationary, per_row and jacobian";
  const bool needs_diagonal = rule == Rule::stationary || rule == Rule::per_row || rule == Rule::jacobian;
  if (rule == Rule::per_row)
    checks.optional("diagonal", diagonal, needs_diagonal, rules, {N, S});
  else if (rule == Rule::jacobian)
    checks.optional("diagonal", diagonal, needs_diagonal, rules,
                    {cell.projects ? G : cell.gates, cell.projects ? O : H});
  else
    checks.optional("diagonal", diagonal, needs_diagonal, rules, {S});
  checks.that(corrections >= 0, "corrections must be at least 0, got ", corrections);
  checks.that(rule != Rule::exact || corrections == 0, "the rule exact takes no corrections, got ", corrections);
  checks.tensor("carry", carry, {B, S});
  checks.optional("grad_x", grad_x, {N, x.size(1)});
  check_w_ih(checks, "grad_w_ih", grad_w_ih, G, I);
  checks.tensor("grad_w_hh", grad_w_hh, {G, columns});
  checks.optional("grad_w_hr", grad_w_hr, w_hr.has_value(), "with w_hr", {O, H});
  checks.optional("grad_b_ih", grad_b_ih, {G});
  checks.optional("grad_b_hh", grad_b_hh, grad_b_ih.has_value(), "with grad_b_ih", {G});
  checks.optional("residual", residual, corrections > 0, "with corrections", {N, S});
  with_dtype(checks, [&](auto type) {
    using T = decltype(type);
    layer_backward<T>({.layer = layer_args<T>(cell, range, bf16, x, w_ih, w_hh, w_hr),
                       .rule = rule,
                       .corrections = corrections,
                       .gates = cell.gates == 1 ? data<T>(y) : data<T>(gates),
                       .aux = data<T>(aux),
                       .y = data<T>(y),
                       .h0 = data<T>(h0),
                       .c0 = data<T>(c0),
                       .grad_y = data<T>(grad_y),
                       .grad_final = data<T>(grad_final),
                       .diagonal = rule == Rule::jacobian ? nullptr : data<T>(diagonal),
                       .w_hh_diag = rule == Rule::jacobian ? data<T>(diagonal) : nullptr,
                       .carry = data<T>(carry),
                       .grad_x = data<T>(grad_x),
                       .grad_w_ih = data<T>(grad_w_ih),
                       .grad_w_hh = data<T>(grad_w_hh),
                       .grad_w_hr = data<T>(grad_w_hr),
                       .grad_b_ih = data<T>(grad_b_ih),
                       .grad_b_hh = data<T>(grad_b_hh),
                       .residual = data<T>(residual)});
  });
}

void sum_jacobians(StringHandle cell_name, const OptionalTensor& gates, const OptionalTensor& aux, const Tensor& y,
                   const Tensor& h0, const OptionalTensor& c0, const OptionalTensor& w_hh_diag,
                   const OptionalTensor& batch_sizes, Tensor sums) {
  const Name of_cell(cell_name);
  const CellEntry& cell = find_cell(of_cell.view());
  const Checks checks("sum_jacobians", y);
  checks.dims("y", y, 2);
  checks.dims("h0", h0, 2);
  if (c0) checks.dims("c0", *c0, 2);
  const int64_t hidden = cell.projects && c0 ? c0->size(1) / cell.parts_of_c() : h0.size(1);
  const StepRange range = checked_range(checks, y.size(0), hidden, h0, batch_sizes);
  const int64_t N = range.rows, H = range.hidden;
  check_saved(checks, cell, N, H, gates, aux, true);
  checks.tensor("y", y, {N, range.output});
  check_c(checks, "c0", cell, range, c0);
  checks.optional("w_hh_diag", w_hh_diag, !cell.projects, "for a cell without a projection", {cell.gates, H});
  checks.tensor("sums", sums, {((cell.projects ? cell.gates : 1) + cell.states - 1) * H});
  with_dtype(checks, [&](auto type) {
    using T = decltype(type);
    ReverseArgs<T> args{};
    args.range = range;
    args.gates = cell.gates == 1 ? data<T>(y) : data<T>(gates), args.aux = data<T>(aux), args.y = data<T>(y);
    args.first_h = data<T>(h0), args.first_c = data<T>(c0), args.first_c_stride = cell.parts_of_c() * H;
    args.w_hh_diag = data<T>(w_hh_diag), args.sums = data<T>(sums);
    // A Jacobian is some 100 operations per unit.
    run_team<Plain<T>>(N * H * 100, [&](Worker& worker) { cell.loops(T{}).sum_jacobians(worker, args); });
  });
}

void head_loss(bool bf16, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& targets, Tensor losses,
               OptionalTensor grad_x, OptionalTensor grad_w, OptionalTensor grad_bias) {
  const Checks checks("head_loss", ScalarType::Float);
  checks.dims("x", x, 2);
  checks.dims("w", w, 2);
  const int64_t N = x.size(0), H = x.size(1), V = w.size(0);
  checks.that(H > 0 && V > 0, "expected at least one input and one class, got ", H, " and ", V);
  checks.tensor("x", x, {N, H});
  checks.tensor("w", w, {V, H});
  checks.tensor("bias", bias, {V});
  checks.tensor("targets", targets, {N}, ScalarType::Long);
  checks.tensor("losses", losses, {N});
  const bool wanted = grad_x || grad_w || grad_bias;
  checks.optional("grad_x", grad_x, wanted, "with the other gradients", {N, H});
  checks.optional("grad_w", grad_w, wanted, "with the other gradients", {V, H});
  checks.optional("grad_bias", grad_bias, wanted, "with the other gradients", {V});
  const int64_t* target = data<int64_t>(targets);
  for (int64_t i = 0; i < N; ++i)
    if (target[i] < 0 || target[i] >= V)
      throw std::out_of_range("head_loss: targets must be ids of the " + std::to_string(V) + " classes, got " +
                              std::to_string(target[i]));
  run_head_loss({.rows = N,
                 .inputs = H,
                 .classes = V,
                 .bf16 = bf16,
                 .x = data<float>(x),
                 .w = data<float>(w),
                 .bias = data<float>(bias),
                 .targets = target,
                 .losses = data<float>(losses),
                 .grad_x = data<float>(grad_x),
                 .grad_w = data<float>(grad_w),
                 .grad_bias = data<float>(grad_bias)});
}

}  // namespace
}  // namespace statefeed

STABLE_TORCH_LIBRARY_FRAGMENT(statefeed, m) {
  m.def("cell_sizes(str cell) -> int[]");
  m.def(
      "layer_forward(str cell, bool bf16, Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor h0, "
      "Tensor? batch_sizes, Tensor(a!)? gates, Tensor(b!)? aux, Tensor(c!) y, Tensor(d!) h, "
      "Tensor(e!)? c, Tensor? w_hr=None, Tensor? c0=None) -> ()");
  m.def(
      "layer_backward(str cell, str rule, int corrections, bool bf16, Tensor x, Tensor w_ih, Tensor w_hh, Tensor? "
      "gates, "
      "Tensor? aux, Tensor y, Tensor h0, Tensor? c0, Tensor grad_y, Tensor grad_final, Tensor? diagonal, "
      "Tensor? batch_sizes, Tensor(a!) carry, Tensor(b!)? grad_x, Tensor(c!) grad_w_ih, Tensor(d!) grad_w_hh, "
      "Tensor(e!)? grad_b_ih, Tensor(f!)? grad_b_hh, Tensor(g!)? residual, Tensor? w_hr=None, "
      "Tensor(h!)? grad_w_hr=None) -> ()");
  m.def(
      "sum_jacobians(str cell, Tensor? gates, Tensor? aux, Tensor y, Tensor h0, Tensor? c0, Tensor? w_hh_diag, "
      "Tensor? batch_sizes, Tensor(a!) sums) -> ()");
  m.def(
      "head_loss(bool bf16, Tensor x, Tensor w, Tensor bias, Tensor targets, Tensor(a!) losses, Tensor(b!)? grad_x, "
      "Tensor(c!)? grad_w, Tensor(d!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(statefeed, CompositeExplicitAutograd, m) {
  m.impl("cell_sizes", TORCH_BOX(&statefeed::cell_sizes));
}

STABLE_TORCH_LIBRARY_IMPL(statefeed, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&statefeed::forward));
  m.impl("layer_backward", TORCH_BOX(&statefeed::backward));
  m.impl("sum_jacobians", TORCH_BOX(&statefeed::sum_jacobians));
  m.impl("head_loss", TORCH_BOX(&statefeed::head_loss));
}
