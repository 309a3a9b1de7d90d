// sLSTM. c = f c' + i z;  n = f n' + i;  h = o c / n;  z = tanh(.), o = sigmoid(.), i and f exponential
// Each cell is a translation unit of its own so that the loops, most of the compile time, are compiled in parallel.
#include "loops.h"

namespace statefeed {

namespace {

// c and n are divided by exp(m), and no gradient depends on m. log_f is logsigmoid of the forget gate's pre-activation,
// or the pre-activation.
//   m = pre_i where n' = 0, else max(pre_i, log_f + m');   i = exp(pre_i - m);   f = min(exp(log_f + m' - m), 1)
template <class T, bool exponential_f>
struct Slstm {
  static constexpr int gates = 4, states = 3, constant_states = 1, shared_gates = 4, unit_vectors = 1;
  static constexpr bool projects = false;
  static constexpr int aux_parts = exponential_f ? 2 : 3;  // c, n, and the slope of log_f where it is not 1
  enum { c, n, m };                                        // parts of the state besides h

  static void step(const ForwardRow<T>& row) {
    const Vector<T> zero{}, one = splat(T(1));
    const Vector<T> pre_i = row.preactivation(0) + row.hidden_product(0),
                    pre_f = row.preactivation(1) + row.hidden_product(1),
                    z = tanh<T>(row.preactivation(2) + row.hidden_product(2)),
                    o = sigmoid<T>(row.preactivation(3) + row.hidden_product(3)), previous_n = row.at(row.c, n);
    // One of i and f is 1, and the other the exponential of minus the distance of the two logarithms.
    Vector<T> slope = one;  // of log_f
    const Vector<T> log_f = exponential_f ? pre_f : log_sigmoid<T>(pre_f, slope), previous = log_f + row.at(row.c, m),
                    distance = previous - pre_i, smaller = exp<T>(distance < zero ? distance : -distance);
    const auto previous_is_larger = distance >= zero, from_previous = previous_is_larger & (previous_n != zero);
    const Vector<T> i = from_previous ? smaller : one, f = previous_is_larger ? one : smaller,
                    cell_state = f * row.at(row.c, c) + i * z, normalizer = f * previous_n + i;
    row.put(row.c, cell_state, c);
    row.put(row.c, normalizer, n);
    row.put(row.c, from_previous ? previous : pre_i, m);
    row.put(row.y, o * (cell_state / normalizer));
    if (!row.aux) return;
    row.save_gate(0, i), row.save_gate(1, f), row.save_gate(2, z), row.save_gate(3, o);
    row.put(row.aux, cell_state, c);
    row.put(row.aux, normalizer, n);
    if (!exponential_f) row.put(row.aux, slope, 2);
  }

  struct Local {
    Vector<T> f;
    Vector<T> dc_di, dc_df, dn_df, dc_dz, dh_do;  // by the pre-activations, at fixed c and n in dh_do; dn_di is i
    Vector<T> dn_di, dh_dc, dh_dn;
  };
  static Local local(const ReverseRow<T>& row) {
    const T one = 1;
    const Vector<T> i = row.at(row.gates, 0), f = row.at(row.gates, 1), z = row.at(row.gates, 2),
                    o = row.at(row.gates, 3), y = row.at(row.y), reciprocal_n = one / row.at(row.aux, n),
                    f_slope = exponential_f ? f : f * row.at(row.aux, 2);
    return {.f = f,
            .dc_di = i * z,
            .dc_df = f_slope * row.at(row.previous_c, c),
            .dn_df = f_slope * row.at(row.previous_c, n),
            .dc_dz = i * (one - z * z),
            .dh_do = y * (one - o),
            .dn_di = i,
            .dh_dc = o * reciprocal_n,
            .dh_dn = -y * reciprocal_n};
  }
  static Vector<T> jacobian(const ReverseRow<T>& row, const Local& l, int state) {
    if (state > 0) return l.f;
    const T* w = row.w_hh_diag;
    return l.dh_dc * (l.dc_di * row.at(w, 0) + l.dc_df * row.at(w, 1) + l.dc_dz * row.at(w, 2)) +
           l.dh_dn * (l.dn_di * row.at(w, 0) + l.dn_df * row.at(w, 1)) + l.dh_do * row.at(w, 3);
  }
  static void reverse(const ReverseRow<T>& row) {
    const Local l = local(row);
    const Vector<T> delta = row.at(row.grad_y) + row.at_state(row.carry, 0),
                    gamma_c = row.at_state(row.carry, 1) + l.dh_dc * delta,
                    gamma_n = row.at_state(row.carry, 2) + l.dh_dn * delta;
    row.put_gate_grad(0, l.dc_di * gamma_c + l.dn_di * gamma_n);
    row.put_gate_grad(1, l.dc_df * gamma_c + l.dn_df * gamma_n);
    row.put_gate_grad(2, l.dc_dz * gamma_c);
    row.put_gate_grad(3, l.dh_do * delta);
    Vector<T> D_h{}, D_c = l.f, D_n = l.f;
    if (row.has_diagonal()) {
      const T* D = row.diagonal;
      D_h = row.at_state(D, 0), D_c = row.at_state(D, 1), D_n = row.at_state(D, 2);
    }
    if (row.rule == Rule::jacobian) D_h = jacobian(row, l, 0);
    row.feed_back(0, D_h, Vector<T>{}, delta);
    row.feed_back(1, D_c, l.f, gamma_c);
    row.feed_back(2, D_n, l.f, gamma_n);
  }
};

template <class T>
using SlstmSigmoid = Slstm<T, false>;
template <class T>
using SlstmExponential = Slstm<T, true>;

}  // namespace

constinit const CellEntry slstm_cell = cell_entry<SlstmSigmoid>("slstm");
constinit const CellEntry slstm_exp_cell = cell_entry<SlstmExponential>("slstm_exp");

}  // namespace statefeed
