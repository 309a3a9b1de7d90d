// The operators as torch sees them, through its stable ABI. Arguments are made and checked in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "head.h"
#include "kernels.h"
#include "product.h"
#include "threads.h"

namespace statefeed {

int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

void run_parallel(int64_t ranks, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, ranks, 1, body, context));
}

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* data(const Optional& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class Body>
void with_type(const Tensor& like, Body body) {
  if (like.scalar_type() == torch::headeronly::ScalarType::Double)
    body(double{});
  else
    body(float{});
}

template <class T>
const CellKernels<T>& kernels_of(int64_t cell) {
  if (cell == 0) return gru_kernels<T>();
  if (cell == 1) return lstm_kernels<T>();
  return cell == 2 ? tanh_kernels<T>() : relu_kernels<T>();
}

template <class T>
void set_stretch(Stretch<T>& s, const Tensor& y, const Tensor& h0, const Optional& sizes) {
  s.batch = h0.size(0), s.hidden = h0.size(1), s.sizes = data<int64_t>(sizes);
  s.rows = y.size(0);
  s.steps = s.batch == 0 ? 0 : sizes ? sizes->size(0) : y.size(0) / s.batch;
}

template <class T>
void set_layer(Layer<T>& s, int64_t cell, bool rounded, const Tensor& x, const Tensor& w_ih, const Tensor& w_hh) {
  s.cell = &kernels_of<T>(cell), s.rounded = rounded, s.inputs = x.size(1);
  s.x = data<T>(x), s.w_ih = data<T>(w_ih), s.w_hh = data<T>(w_hh);
}

void forward(int64_t cell, bool rounded, const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const Optional& bias,
             const Optional& hidden_bias, const Tensor& h0, const Optional& sizes, Optional gates, Optional extra,
             Tensor y, Optional c) {
  with_type(y, [&](auto type) {
    using T = decltype(type);
    LayerForward<T> s{};
    set_stretch(s, y, h0, sizes);
    set_layer(s, cell, rounded, x, w_ih, w_hh);
    s.bias = data<T>(bias), s.hidden_bias = data<T>(hidden_bias), s.h0 = data<T>(h0);
    s.y = data<T>(y), s.gates = s.cell->gates == 1 ? s.y : data<T>(gates), s.extra = data<T>(extra), s.c = data<T>(c);
    run_layer_forward(s);
  });
}

void backward(int64_t cell, bool rounded, int64_t rule, bool exact, int64_t corrections, const Tensor& x, const Tensor& w_ih,
              const Tensor& w_hh, const Optional& gates, const Optional& extra, const Tensor& y, const Tensor& h0,
              const Optional& c0, const Tensor& e, const Tensor& final_e, const Optional& diagonal,
              const Optional& sizes, Tensor carry, Optional d_x, Tensor d_ih, Tensor d_hh, Tensor sums,
              Optional residual) {
  with_type(y, [&](auto type) {
    using T = decltype(type);
    LayerBackward<T> s{};
    set_stretch(s, y, h0, sizes);
    set_layer(s, cell, rounded, x, w_ih, w_hh);
    s.rule = static_cast<Diagonal>(rule), s.exact = exact, s.corrections = corrections;
    s.y = data<T>(y), s.gates = s.cell->gates == 1 ? s.y : data<T>(gates), s.extra = data<T>(extra);
    s.h0 = data<T>(h0), s.c0 = data<T>(c0), s.e = data<T>(e), s.final_e = data<T>(final_e);
    s.diagonal = data<T>(diagonal), s.carry = data<T>(carry), s.d_x = data<T>(d_x), s.d_ih = data<T>(d_ih);
    s.d_hh = data<T>(d_hh), s.sums = data<T>(sums), s.residual = data<T>(residual);
    run_layer_backward(s);
  });
}

void sum_jacobians(int64_t cell, const Optional& gates, const Optional& extra, const Tensor& y, const Tensor& h0,
                   const Optional& c0, const Tensor& diagonal, const Optional& sizes, Tensor sums) {
  with_type(y, [&](auto type) {
    using T = decltype(type);
    const CellKernels<T>& kernels = kernels_of<T>(cell);
    Reverse<T> s{};
    set_stretch(s, y, h0, sizes);
    s.y = data<T>(y), s.gates = kernels.gates == 1 ? s.y : data<T>(gates), s.extra = data<T>(extra);
    s.first_h = data<T>(h0), s.first_c = data<T>(c0), s.diagonal = data<T>(diagonal), s.sums = data<T>(sums);
    with_team<Exact<T>>(s.rows * s.hidden * 100, [&](Member& member) { kernels.sum_jacobians(member, s); });
  });
}

void head_loss(bool rounded, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& targets, Tensor losses,
               Optional d_x, Optional d_w, Optional d_bias) {
  run_head_loss({x.size(0), x.size(1), w.size(0), rounded, data<float>(x), data<float>(w), data<float>(bias),
                 data<int64_t>(targets), data<float>(losses), data<float>(d_x), data<float>(d_w), data<float>(d_bias)});
}

}  // namespace
}  // namespace statefeed

STABLE_TORCH_LIBRARY_FRAGMENT(statefeed, m) {
  m.def(
      "layer_forward(int cell, bool rounded, Tensor x, Tensor w_ih, Tensor w_hh, Tensor? bias, Tensor? hidden_bias, Tensor h0, "
      "Tensor? sizes, Tensor(a!)? gates, Tensor(b!)? extra, Tensor(c!) y, Tensor(d!)? c) -> ()");
  m.def(
      "layer_backward(int cell, bool rounded, int rule, bool exact, int corrections, Tensor x, Tensor w_ih, Tensor w_hh, "
      "Tensor? gates, Tensor? extra, Tensor y, Tensor h0, Tensor? c0, Tensor e, Tensor final_e, Tensor? diagonal, "
      "Tensor? sizes, Tensor(a!) carry, Tensor(b!)? d_x, Tensor(c!) d_ih, Tensor(d!) d_hh, Tensor(e!) sums, "
      "Tensor(f!)? residual) -> ()");
  m.def(
      "sum_jacobians(int cell, Tensor? gates, Tensor? extra, Tensor y, Tensor h0, Tensor? c0, Tensor diagonal, "
      "Tensor? sizes, Tensor(a!) sums) -> ()");
  m.def(
      "head_loss(bool rounded, Tensor x, Tensor w, Tensor bias, Tensor targets, Tensor(a!) losses, Tensor(b!)? d_x, "
      "Tensor(c!)? d_w, Tensor(d!)? d_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(statefeed, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&statefeed::forward));
  m.impl("layer_backward", TORCH_BOX(&statefeed::backward));
  m.impl("sum_jacobians", TORCH_BOX(&statefeed::sum_jacobians));
  m.impl("head_loss", TORCH_BOX(&statefeed::head_loss));
}
