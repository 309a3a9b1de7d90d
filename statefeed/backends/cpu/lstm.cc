// The lstm loops for float and double.
#include "loops.h"

namespace statefeed {

template <class T>
const CellKernels<T>& lstm_kernels() {
  using Cell = Lstm<T>;
  static const CellKernels<T> kernels = cell_kernels<T, Cell>();
  return kernels;
}
template const CellKernels<float>& lstm_kernels<float>();
template const CellKernels<double>& lstm_kernels<double>();

}  // namespace statefeed
