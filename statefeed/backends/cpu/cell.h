// Interface of the cells: the arguments of the loops over time, and one row of them at one vector of units.
#pragma once

#include <cstdint>
#include <string_view>

#include "simd.h"

namespace statefeed {

// The approximation of the Jacobian between two steps in the backward pass.
enum class Rule {
  stationary,  // a diagonal (states * hidden), the same for every row
  per_row,     // a diagonal (rows, states * hidden): a row for every step of every sequence
  direct,      // the part of the Jacobian without weights: GRU z, LSTM f on c; zero for an RNN
  jacobian,    // the diagonal of the Jacobian
  exact,       // the whole Jacobian: the direct part, and a product with W_hh at every step
};

// Rows of consecutive steps: `batch_sizes[t]` rows at step t (null: `batch` rows at every step). May be any part of a
// longer sequence. `output` is the width of h: `hidden`, or fewer where the cell's output u is projected, h = u W_hr^T.
struct StepRange {
  int64_t steps, batch, hidden, output, rows;
  const int64_t* batch_sizes;
  int64_t size(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
};

// `aux` is what a cell saves in addition to its gates, (rows, aux parts * hidden). It begins with the parts of the
// state besides h: the LSTM's c. The GRU saves W_hn h + b_hn; null for an RNN, which saves nothing (its `gates` are y).
// W_hh may be block-diagonal: `heads` blocks of equal size, one for the units of each head.
template <class T>
struct ForwardArgs {
  StepRange range;
  int64_t heads;
  const void* packed_w_hh;  // panels of the packed_t that the product takes
  const T* hidden_bias;     // GRU: b_hn; or null
  const T* first_h;         // the state before the first step
  T* gates;                 // in: the input product with all other biases; out: the gates (RNN: y)
  T* aux;                   // out; null: nothing is saved
  T* y;                     // out, (rows, output)
  const void* packed_w_hr;  // with a projection: panels of the packed_t that the product takes
  T* unprojected;           // with a projection: u of one step, (batch, hidden)
  T* c;                     // the other parts of the running state, (batch, parts * hidden), as the LSTM's c; or null
};

template <class T>
struct ReverseArgs {
  StepRange range;
  int64_t heads;
  Rule rule;
  const T *gates, *aux, *y;
  const T *first_h, *first_c;  // the state before the first step
  int64_t first_c_stride;      // between rows of first_c, which are rows of c or of aux
  const T* grad_y;
  // With a projection: the gradient of h (rows, output), which the steps of the exact rule write and others read; that
  // of u (rows, hidden), likewise; u (rows, hidden), out; and the exact rule's panels of W_hr.
  T *delta, *grad_unprojected, *unprojected;
  const T* packed_w_hr;
  const T* output_diagonal;  // with a projection, jacobian: D of h, (rows, output)
  const T* diagonal;         // stationary, per_row: D
  int64_t diagonal_stride;   // between rows of D: 0 if stationary
  const T* w_hh_diag;        // jacobian: the diagonals of W_hh, (gates, hidden)
  const T* residual;  // (rows, states * hidden): what the pass before adds to the gradient of the state before; or null
  T* next_residual;   // the element-wise part of the same for the next pass, or null; may be `residual`
  const T* packed_w_hh;      // exact: panels
  T* carry;                  // (batch, states * hidden): in: gradient of the final state; out: of the initial one
  int64_t gate_grad_stride;  // between rows of gate_grads and of separate_grads
  T* gate_grads;             // out: gradients at the pre-activations of x W_ih^T + b_ih
  T* separate_grads;         // out: those at h W_hh^T + b_hh where they differ (GRU: the candidate's); or null
  T* sums;  // sum_jacobians: += diag(J[t]), (states, hidden); with a projection du/dgates in place of that of h
};

// One row (step, batch element) at one vector of units, of which `count` lanes are valid.
template <class T>
struct ForwardRow {
  T *gates, *aux, *y, *c;
  const T *previous_h, *hidden_bias;
  const T* product;  // h W_hh^T: a vector for every gate
  int64_t hidden, unit;
  int count;

  Vector<T> preactivation(int gate) const { return load(gates + gate * hidden + unit, count); }
  Vector<T> hidden_product(int gate) const { return load(product + gate * lanes<T>); }
  Vector<T> at(const T* row, int part = 0) const { return load(row + part * hidden + unit, count); }
  void put(T* row, Vector<T> value, int part = 0) const { store(row + part * hidden + unit, value, count); }
  void save_gate(int gate, Vector<T> value) const { put(gates, value, gate); }
};

template <class T>
struct ReverseRow {
  const T *gates, *aux, *y, *previous_h, *previous_c, *grad_y, *diagonal, *w_hh_diag, *residual;
  T *next_residual, *carry, *gate_grads, *separate_grads, *sums;
  T* unprojected;
  Rule rule;
  int64_t hidden, output, unit;
  int count;

  // Part `part` of a row that has several of `hidden` each: a gate, a part of c, a sum.
  Vector<T> at(const T* row, int part = 0) const { return load(row + part * hidden + unit, count); }
  void put(T* row, int part, Vector<T> value) const { store(row + part * hidden + unit, value, count); }
  // Part `part` of a row of the whole state, which begins with `output` units of h.
  int64_t state_offset(int part) const { return part ? output + (part - 1) * hidden + unit : unit; }
  Vector<T> at_state(const T* row, int part) const { return load(row + state_offset(part), count); }
  void put_state(T* row, int part, Vector<T> value) const { store(row + state_offset(part), value, count); }
  void put_gate_grad(int gate, Vector<T> value) const { put(gate_grads, gate, value); }
  // Whether the rule's D is an array that the caller made.
  bool has_diagonal() const { return rule == Rule::stationary || rule == Rule::per_row; }
  // carry = D * delta + residual; the next pass's residual begins as (direct - D) * delta.
  void feed_back(int state, Vector<T> D, Vector<T> direct, Vector<T> delta) const {
    Vector<T> grad_prev = D * delta;
    if (residual) grad_prev += at_state(residual, state);
    if (next_residual) put_state(next_residual, state, (direct - D) * delta);
    put_state(carry, state, grad_prev);
  }
};

}  // namespace statefeed
