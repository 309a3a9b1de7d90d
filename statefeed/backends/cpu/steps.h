// The arguments of the loops over time. Rows are the steps one after the other, `sizes[t]` of them at step t (null:
// `batch` at every step); a call may be any stretch of a longer sequence.
#pragma once

#include <cstdint>

namespace statefeed {

// The feedback that a reverse pass applies: what stands for the Jacobian between two steps.
enum class Diagonal : int64_t { stationary, direct, jacobian };

template <class T>
struct Stretch {
  int64_t steps, batch, hidden, rows;
  const int64_t* sizes;
  int64_t size(int64_t t) const { return sizes ? sizes[t] : batch; }
};

template <class T>
struct Forward : Stretch<T> {
  const void* packed;      // W_hh in panels, of the type that the product takes
  const T* bias;           // b_hn (GRU) or null
  const T* first_h;        // the state before the first step
  T* gates;                // in: the input product with all other biases; out: the gates (RNN: y itself)
  T* extra;                // out: GRU q = W_hn h + b_hn, LSTM c; null: not kept
  T *y, *c;                // c (LSTM): the running cell state (batch, hidden)
};

template <class T>
struct Reverse : Stretch<T> {
  Diagonal rule;
  const T *gates, *extra, *y, *first_h, *first_c, *e;
  const T* diagonal;      // (states, hidden) stationary, (gates, hidden) the diagonals of W_hh for the Jacobian
  const T* residual;      // (rows, states * hidden) what the pass before adds below each step, or null
  T* next_residual;       // the element-wise part of the same for the next pass, or null; may be `residual`
  const T* packed;        // W_hh in panels for the exact backward, or null
  T* carry;               // (batch, states * hidden): in: gradient of the final state; out: of the initial one
  int64_t d_stride;       // between rows of d and of d_hidden
  T *d, *d_hidden;        // gradients at the pre-activations; d_hidden: GRU's dn * r
  T* sums;                // += column sums of d and d_hidden, one row for each member of the team
};

}  // namespace statefeed
