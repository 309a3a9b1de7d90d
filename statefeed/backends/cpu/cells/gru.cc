// GRU. r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z);  n = tanh(x_n + r q), q = W_hn h' + b_hn;  h = z h' + (1 - z) n
// Each cell is a translation unit of its own so that the loops, most of the compile time, are compiled in parallel.
#include "loops.h"

namespace statefeed {

namespace {

template <class T>
struct Gru {
  static constexpr int gates = 3, states = 1, shared_gates = 2, unit_vectors = 1;
  static constexpr bool projects = false;
  static constexpr int constant_states = 0, aux_parts = 1;  // q, the hidden side of the candidate

  static void step(const ForwardRow<T>& row) {
    const T one = 1;
    const Vector<T> r = sigmoid<T>(row.preactivation(0) + row.hidden_product(0));
    const Vector<T> z = sigmoid<T>(row.preactivation(1) + row.hidden_product(1));
    Vector<T> candidate_hidden = row.hidden_product(2);
    if (row.hidden_bias) candidate_hidden += row.at(row.hidden_bias);
    const Vector<T> n = tanh<T>(row.preactivation(2) + r * candidate_hidden), h = row.at(row.previous_h);
    row.put(row.y, z * h + (one - z) * n);
    if (!row.aux) return;
    row.save_gate(0, r), row.save_gate(1, z), row.save_gate(2, n);
    row.put(row.aux, candidate_hidden);
  }

  struct Local {
    Vector<T> r, z, n, q, h, dh_dz, dh_dn;  // derivatives of h[t] by the pre-activations of z and n
  };
  static Local local(const ReverseRow<T>& row) {
    const T one = 1;
    Local l{.r = row.at(row.gates, 0),
            .z = row.at(row.gates, 1),
            .n = row.at(row.gates, 2),
            .q = row.at(row.aux),
            .h = row.at(row.previous_h),
            .dh_dz = {},
            .dh_dn = {}};
    l.dh_dz = (l.h - l.n) * l.z * (one - l.z);
    l.dh_dn = (one - l.z) * (one - l.n * l.n);
    return l;
  }
  static Vector<T> jacobian(const ReverseRow<T>& row, const Local& l, int) {
    const T one = 1;
    const T* w = row.w_hh_diag;
    return l.z + l.dh_dz * row.at(w, 1) + l.dh_dn * l.r * (row.at(w, 2) + l.q * (one - l.r) * row.at(w, 0));
  }
  static void reverse(const ReverseRow<T>& row) {
    const T one = 1;
    const Local l = local(row);
    const Vector<T> delta = row.at(row.grad_y) + row.at(row.carry), grad_n = delta * l.dh_dn, grad_q = grad_n * l.r;
    row.put_gate_grad(0, grad_q * l.q * (one - l.r));
    row.put_gate_grad(1, delta * l.dh_dz);
    row.put_gate_grad(2, grad_n);
    row.put(row.separate_grads, 0, grad_q);
    Vector<T> D = l.z;
    if (row.has_diagonal()) D = row.at(row.diagonal);
    if (row.rule == Rule::jacobian) D = jacobian(row, l, 0);
    row.feed_back(0, D, l.z, delta);
  }
};

}  // namespace

constinit const CellEntry gru_cell = cell_entry<Gru>("gru");

}  // namespace statefeed
