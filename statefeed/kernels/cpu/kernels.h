// What each translation unit offers to the registration.
#pragma once

#include "bulk.h"
#include "steps.h"

namespace statefeed {

template <class T>
struct CellKernels {
  int gates, states, unit_vectors;
  void (*forward)(const Forward<T>&);
  void (*reverse)(const Reverse<T>&, Diagonal);
  void (*sum_jacobians)(const Reverse<T>&);
};

template <class T>
const CellKernels<T>& gru_kernels();
template <class T>
const CellKernels<T>& lstm_kernels();
template <class T>
const CellKernels<T>& tanh_kernels();
template <class T>
const CellKernels<T>& relu_kernels();

template <class T>
void run_product(const Product<T>&);
template <class T>
void run_row_products(const RowSum<T>&);

}  // namespace statefeed
