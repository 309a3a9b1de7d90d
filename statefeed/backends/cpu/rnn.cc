// The rnn loops for float and double.
#include "loops.h"

namespace statefeed {

template <class T>
const CellKernels<T>& tanh_kernels() {
  using Cell = Rnn<T, false>;
  static const CellKernels<T> kernels = cell_kernels<T, Cell>();
  return kernels;
}
template const CellKernels<float>& tanh_kernels<float>();
template const CellKernels<double>& tanh_kernels<double>();

template <class T>
const CellKernels<T>& relu_kernels() {
  using Cell = Rnn<T, true>;
  static const CellKernels<T> kernels = cell_kernels<T, Cell>();
  return kernels;
}
template const CellKernels<float>& relu_kernels<float>();
template const CellKernels<double>& relu_kernels<double>();

}  // namespace statefeed
