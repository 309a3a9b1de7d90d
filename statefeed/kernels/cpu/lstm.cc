// The lstm loops for float and double.
#include "kernels.h"
#include "loops.h"

namespace statefeed {

template <class T>
const CellKernels<T>& lstm_kernels() {
  using Cell = Lstm<T>;
  static const CellKernels<T> kernels{Cell::gates,      Cell::states,     Cell::unit_vectors,    Cell::split, Cell::sums,
                                      forward<T, Cell>, reverse<T, Cell>, sum_jacobians<T, Cell>};
  return kernels;
}
template const CellKernels<float>& lstm_kernels<float>();
template const CellKernels<double>& lstm_kernels<double>();

}  // namespace statefeed
