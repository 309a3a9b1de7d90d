// RNN with tanh or relu. h = act(x W_ih^T + h' W_hh^T + b)
// Each cell is a translation unit of its own so that the loops, most of the compile time, are compiled in parallel.
#include "loops.h"

namespace statefeed {

namespace {

template <class T, bool relu>
struct Rnn {
  static constexpr int gates = 1, states = 1, shared_gates = 1, unit_vectors = 2;
  static constexpr bool projects = false;
  static constexpr int constant_states = 0, aux_parts = 0;  // the slope follows from y

  static void step(const ForwardRow<T>& row) {
    const Vector<T> x = row.preactivation(0) + row.hidden_product(0);
    row.put(row.y, relu ? (x < Vector<T>{} ? Vector<T>{} : x) : tanh<T>(x));
  }

  struct Local {
    Vector<T> slope;
  };
  static Local local(const ReverseRow<T>& row) {
    const Vector<T> y = row.at(row.y);
    return {relu ? (y > Vector<T>{} ? splat(T(1)) : Vector<T>{}) : T(1) - y * y};
  }
  static Vector<T> jacobian(const ReverseRow<T>& row, const Local& l, int) { return l.slope * row.at(row.w_hh_diag); }
  static void reverse(const ReverseRow<T>& row) {
    const Local l = local(row);
    const Vector<T> delta = row.at(row.grad_y) + row.at(row.carry);
    row.put_gate_grad(0, delta * l.slope);
    Vector<T> D{};
    if (row.has_diagonal()) D = row.at(row.diagonal);
    if (row.rule == Rule::jacobian) D = jacobian(row, l, 0);
    row.feed_back(0, D, Vector<T>{}, delta);
  }
};

template <class T>
using RnnTanh = Rnn<T, false>;
template <class T>
using RnnRelu = Rnn<T, true>;

}  // namespace

constinit const CellEntry rnn_tanh_cell = cell_entry<RnnTanh>("rnn_tanh");
constinit const CellEntry rnn_relu_cell = cell_entry<RnnRelu>("rnn_relu");

}  // namespace statefeed
