// LSTM with a projected output: u = o tanh(c), h = u W_hr^T; see projection.h.
// Each cell is a translation unit of its own so that the loops, most of the compile time, are compiled in parallel.
#include "lstm.h"

namespace statefeed {

namespace {

template <class T>
struct LstmProjected : Lstm<T> {
  static constexpr bool projects = true;
  using Local = typename Lstm<T>::Local;

  static Vector<T> output_derivative(const Local& l, int gate) {
    const Vector<T> of_c[] = {l.dc_di, l.dc_df, l.dc_dg};
    return gate == 3 ? l.dh_do : l.dh_dc * of_c[gate];
  }
  static void reverse(const ReverseRow<T>& row) {
    const Local l = Lstm<T>::local(row);
    const Vector<T> delta = row.at(row.grad_y), gamma = row.at_state(row.carry, 1) + l.dh_dc * delta;
    Lstm<T>::put_gate_grads(row, l, delta, gamma);
    row.put(row.unprojected, 0, l.o * l.tanh_c);
    row.feed_back(1, row.has_diagonal() ? row.at_state(row.diagonal, 1) : l.f, l.f, gamma);
  }
};

}  // namespace

constinit const CellEntry lstm_projected_cell = cell_entry<LstmProjected>("lstm_projected");

}  // namespace statefeed
