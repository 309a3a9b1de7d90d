// The gru loops for float and double.
#include "loops.h"

namespace statefeed {

template <class T>
const CellKernels<T>& gru_kernels() {
  using Cell = Gru<T>;
  static const CellKernels<T> kernels = cell_kernels<T, Cell>();
  return kernels;
}
template const CellKernels<float>& gru_kernels<float>();
template const CellKernels<double>& gru_kernels<double>();

}  // namespace statefeed
