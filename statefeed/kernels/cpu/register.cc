// The operators as torch sees them, through its stable ABI. Arguments are checked in Python, where they are made.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

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

template <class T, class Arguments>
Arguments stretch(const Tensor& y, const Tensor& first, const Optional& sizes) {
  Arguments s{};
  s.hidden = first.size(1);
  s.sizes = data<int64_t>(sizes);
  s.steps = sizes ? sizes->size(0) : y.size(0) / std::max<int64_t>(first.size(0), 1);
  s.batch = first.size(0);
  return s;
}

Tensor pack(const Tensor& w, int64_t gates) {
  const int64_t units = w.size(0) / gates, depth = w.size(1);
  Tensor packed;
  with_type(w, [&](auto type) {
    using T = decltype(type);
    const int vectors = gates == 1 ? bulk_vectors : 1, width = vectors * lanes<T>;
    packed = torch::stable::new_empty(w, {panel_count(units, width) * width * gates * depth});
    pack_rows(data<T>(w), gates, units, depth, vectors, data<T>(packed));
  });
  return packed;
}

Tensor pack_transposed(const Tensor& w) {
  Tensor packed;
  with_type(w, [&](auto type) {
    using T = decltype(type);
    constexpr int width = bulk_vectors * lanes<T>;
    packed = torch::stable::new_empty(w, {panel_count(w.size(1), width) * width * w.size(0)});
    pack_columns(data<T>(w), w.size(1), w.size(0), bulk_vectors, data<T>(packed));
  });
  return packed;
}

void product_into(const Tensor& a, const Tensor& packed, const Optional& bias, Tensor out, bool add) {
  with_type(a, [&](auto type) {
    using T = decltype(type);
    run_product<T>({a.size(0), a.size(1), out.size(1), a.stride(0), out.stride(0), data<T>(a), data<T>(packed),
                    data<T>(bias), data<T>(out), add});
  });
}

void add_row_products_into(const Tensor& a, const Tensor& b, Tensor out) {
  with_type(a, [&](auto type) {
    using T = decltype(type);
    run_row_products<T>({a.size(0), a.size(1), b.size(1), a.stride(0), b.stride(0), out.stride(0), data<T>(a),
                         data<T>(b), data<T>(out)});
  });
}

void forward_steps(int64_t cell, const Tensor& packed, const Optional& bias, const Tensor& first_h, Tensor gates,
                   Optional extra, Tensor y, Optional c, const Optional& sizes) {
  with_type(y, [&](auto type) {
    using T = decltype(type);
    auto s = stretch<T, Forward<T>>(y, first_h, sizes);
    s.packed = data<T>(packed), s.bias = data<T>(bias), s.first_h = data<T>(first_h), s.gates = data<T>(gates);
    s.extra = data<T>(extra), s.y = data<T>(y), s.c = data<T>(c);
    kernels_of<T>(cell).forward(s);
  });
}

void reverse_steps(int64_t cell, int64_t mode, const Tensor& gates, const Optional& extra, const Tensor& y,
                   const Tensor& first_h, const Optional& first_c, const Tensor& e, const Optional& diagonal,
                   const Optional& residual, Optional next_residual, const Optional& packed, Tensor carry, Tensor d,
                   Optional d_hidden, Tensor sums, const Optional& sizes) {
  with_type(y, [&](auto type) {
    using T = decltype(type);
    auto s = stretch<T, Reverse<T>>(y, first_h, sizes);
    s.gates = data<T>(gates), s.extra = data<T>(extra), s.y = data<T>(y), s.first_h = data<T>(first_h);
    s.first_c = data<T>(first_c), s.e = data<T>(e), s.diagonal = data<T>(diagonal), s.residual = data<T>(residual);
    s.next_residual = data<T>(next_residual), s.packed = data<T>(packed), s.carry = data<T>(carry);
    s.d = data<T>(d), s.d_hidden = data<T>(d_hidden), s.sums = data<T>(sums);
    kernels_of<T>(cell).reverse(s, static_cast<Diagonal>(mode));
  });
}

void sum_jacobians(int64_t cell, const Tensor& gates, const Optional& extra, const Tensor& y, const Tensor& first_h,
                   const Optional& first_c, const Tensor& diagonal, Tensor sums, const Optional& sizes) {
  with_type(y, [&](auto type) {
    using T = decltype(type);
    auto s = stretch<T, Reverse<T>>(y, first_h, sizes);
    s.gates = data<T>(gates), s.extra = data<T>(extra), s.y = data<T>(y), s.first_h = data<T>(first_h);
    s.first_c = data<T>(first_c), s.diagonal = data<T>(diagonal), s.sums = data<T>(sums);
    kernels_of<T>(cell).sum_jacobians(s);
  });
}

}  // namespace
}  // namespace statefeed

STABLE_TORCH_LIBRARY_FRAGMENT(statefeed, m) {
  m.def("pack(Tensor w, int gates) -> Tensor");
  m.def("pack_transposed(Tensor w) -> Tensor");
  m.def("product(Tensor a, Tensor packed, Tensor? bias, Tensor(a!) out, bool add) -> ()");
  m.def("add_row_products(Tensor a, Tensor b, Tensor(a!) out) -> ()");
  m.def(
      "forward_steps(int cell, Tensor packed, Tensor? bias, Tensor first_h, Tensor(a!) gates, Tensor(b!)? extra, "
      "Tensor(c!) y, Tensor(d!)? c, Tensor? sizes) -> ()");
  m.def(
      "reverse_steps(int cell, int mode, Tensor gates, Tensor? extra, Tensor y, Tensor first_h, Tensor? first_c, "
      "Tensor e, Tensor? diagonal, Tensor? residual, Tensor(a!)? next_residual, Tensor? packed, Tensor(b!) carry, "
      "Tensor(c!) d, Tensor(d!)? d_hidden, Tensor(e!) sums, Tensor? sizes) -> ()");
  m.def(
      "sum_jacobians(int cell, Tensor gates, Tensor? extra, Tensor y, Tensor first_h, Tensor? first_c, "
      "Tensor diagonal, Tensor(a!) sums, Tensor? sizes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(statefeed, CPU, m) {
  m.impl("pack", TORCH_BOX(&statefeed::pack));
  m.impl("pack_transposed", TORCH_BOX(&statefeed::pack_transposed));
  m.impl("product", TORCH_BOX(&statefeed::product_into));
  m.impl("add_row_products", TORCH_BOX(&statefeed::add_row_products_into));
  m.impl("forward_steps", TORCH_BOX(&statefeed::forward_steps));
  m.impl("reverse_steps", TORCH_BOX(&statefeed::reverse_steps));
  m.impl("sum_jacobians", TORCH_BOX(&statefeed::sum_jacobians));
}
