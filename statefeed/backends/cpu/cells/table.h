// The table of cells: names, sizes and loops. A new cell is a file in this folder and two lines here.
#pragma once

#include "cell.h"

namespace statefeed {

class Worker;

template <class T>
struct CellLoops {
  void (*forward)(Worker&, const ForwardArgs<T>&);
  void (*forward_bf16)(Worker&, const ForwardArgs<T>&);
  void (*reverse)(Worker&, const ReverseArgs<T>&);
  void (*sum_jacobians)(Worker&, const ReverseArgs<T>&);
  // With a projection, else null: the scan of the gradient of h, and the derivatives of u by the gates as gate_grads.
  void (*reverse_output)(Worker&, const ReverseArgs<T>&);
  void (*output_derivatives)(Worker&, const ReverseArgs<T>&);
};

// The sizes are checked against the shapes that Python passes (register.cc); Python's are the source.
struct CellEntry {
  std::string_view name;
  int gates, states;    // states: parts of the state with gradients, of which the first is h
  int constant_states;  // parts of the state after these, without gradients
  int shared_gates;     // the first gates, whose gradients at x W_ih^T and at h W_hh^T are the same
  int aux_parts;        // values saved per row and unit besides the gates
  int unit_vectors;     // vectors of units in a panel of W_hh, per gate
  bool projects;        // whether h is a projection of the output u
  CellLoops<float> float_loops;
  CellLoops<double> double_loops;

  int parts_of_c() const { return states + constant_states - 1; }
  // Width of the state with gradients.
  int64_t state_size(const StepRange& range) const { return range.output + (states - 1) * range.hidden; }
  const CellLoops<float>& loops(float) const { return float_loops; }
  const CellLoops<double>& loops(double) const { return double_loops; }
};

extern const CellEntry gru_cell, lstm_cell, lstm_projected_cell, rnn_tanh_cell, rnn_relu_cell, slstm_cell,
    slstm_exp_cell;

inline constexpr const CellEntry* cell_table[] = {&gru_cell,      &lstm_cell,  &lstm_projected_cell, &rnn_tanh_cell,
                                                  &rnn_relu_cell, &slstm_cell, &slstm_exp_cell};

}  // namespace statefeed
