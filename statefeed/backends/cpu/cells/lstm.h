// The formulas of the LSTM, which its two kernels share.
// i, f, o = sigmoid(.), g = tanh(.) of x W_ih^T + h' W_hh^T;  c = f c' + i g;  h = o tanh(c)
#pragma once

#include "loops.h"

namespace statefeed {

template <class T>
struct Lstm {
  static constexpr int gates = 4, states = 2, shared_gates = 4, unit_vectors = 1;
  static constexpr bool projects = false;
  static constexpr int constant_states = 0, aux_parts = 1;  // c

  static void step(const ForwardRow<T>& row) {
    const Vector<T> i = sigmoid<T>(row.preactivation(0) + row.hidden_product(0)),
                    f = sigmoid<T>(row.preactivation(1) + row.hidden_product(1)),
                    g = tanh<T>(row.preactivation(2) + row.hidden_product(2)),
                    o = sigmoid<T>(row.preactivation(3) + row.hidden_product(3)),
                    cell_state = f * row.at(row.c) + i * g;
    row.put(row.c, cell_state);
    row.put(row.y, o * tanh<T>(cell_state));
    if (!row.aux) return;
    row.save_gate(0, i), row.save_gate(1, f), row.save_gate(2, g), row.save_gate(3, o);
    row.put(row.aux, cell_state);
  }

  struct Local {
    Vector<T> i, f, g, o, previous_c, tanh_c;
    Vector<T> dc_di, dc_df, dc_dg, dh_do;  // derivatives by the pre-activations of the gates, at fixed c in dh_do
    Vector<T> dh_dc;
  };
  static Local local(const ReverseRow<T>& row) {
    const T one = 1;
    Local l{.i = row.at(row.gates, 0),
            .f = row.at(row.gates, 1),
            .g = row.at(row.gates, 2),
            .o = row.at(row.gates, 3),
            .previous_c = row.at(row.previous_c),
            .tanh_c = tanh<T>(row.at(row.aux)),
            .dc_di = {},
            .dc_df = {},
            .dc_dg = {},
            .dh_do = {},
            .dh_dc = {}};
    l.dc_di = l.g * l.i * (one - l.i);
    l.dc_df = l.previous_c * l.f * (one - l.f);
    l.dc_dg = l.i * (one - l.g * l.g);
    l.dh_do = l.tanh_c * l.o * (one - l.o);
    l.dh_dc = l.o * (one - l.tanh_c * l.tanh_c);
    return l;
  }
  static Vector<T> jacobian(const ReverseRow<T>& row, const Local& l, int state) {
    if (state == 1) return l.f;
    const T* w = row.w_hh_diag;
    return l.dh_dc * (l.dc_di * row.at(w, 0) + l.dc_df * row.at(w, 1) + l.dc_dg * row.at(w, 2)) +
           l.dh_do * row.at(w, 3);
  }
  // delta: the gradient of h; gamma: that of c.
  static void put_gate_grads(const ReverseRow<T>& row, const Local& l, Vector<T> delta, Vector<T> gamma) {
    row.put_gate_grad(0, gamma * l.dc_di);
    row.put_gate_grad(1, gamma * l.dc_df);
    row.put_gate_grad(2, gamma * l.dc_dg);
    row.put_gate_grad(3, delta * l.dh_do);
  }
  static void reverse(const ReverseRow<T>& row) {
    const Local l = local(row);
    const Vector<T> delta = row.at(row.grad_y) + row.at_state(row.carry, 0),
                    gamma = row.at_state(row.carry, 1) + l.dh_dc * delta;
    put_gate_grads(row, l, delta, gamma);
    Vector<T> D_h{}, D_c = l.f;
    if (row.has_diagonal()) D_h = row.at_state(row.diagonal, 0), D_c = row.at_state(row.diagonal, 1);
    if (row.rule == Rule::jacobian) D_h = jacobian(row, l, 0);
    row.feed_back(0, D_h, Vector<T>{}, delta);
    row.feed_back(1, D_c, l.f, gamma);
  }
};

}  // namespace statefeed
