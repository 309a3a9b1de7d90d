// What each translation unit offers to the registration.
#pragma once

#include "layer.h"
#include "threads.h"

namespace statefeed {

template <class T>
struct CellKernels {
  int gates, states, unit_vectors, split, sums;  // split: gates whose d is the same at input and hidden side
  void (*forward)(Member&, const Forward<T>&);
  void (*forward_rounded)(Member&, const Forward<T>&);
  void (*reverse)(Member&, const Reverse<T>&);
  void (*sum_jacobians)(Member&, const Reverse<T>&);
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
void run_layer_forward(const LayerForward<T>&);
template <class T>
void run_layer_backward(const LayerBackward<T>&);

}  // namespace statefeed
