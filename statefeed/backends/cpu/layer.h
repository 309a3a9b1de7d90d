// One layer in one direction: the arguments of its forward and backward pass.
#pragma once

#include "cell.h"
#include "cells/table.h"

namespace statefeed {

template <class T>
struct LayerArgs {
  const CellEntry* cell;
  StepRange range;
  int64_t inputs;  // columns of W_ih; 0 if there is none, and x are the preactivations
  int64_t heads;
  bool bf16;                        // products of operands converted to bfloat16
  const T *x, *w_ih, *w_hh, *w_hr;  // w_hr: null without a projection
};

template <class T>
struct LayerForwardArgs {
  LayerArgs<T> layer;
  const T *b_ih, *b_hh, *h0;  // biases: null if there are none
  // gates, aux: null if nothing is saved; an RNN's gates are y. h: out: the final state; c: in: the initial one, out:
  // the final one.
  T *gates, *aux, *y, *h, *c;
};

template <class T>
struct LayerBackwardArgs {
  LayerArgs<T> layer;
  Rule rule;
  int64_t corrections;
  const T *gates, *aux, *y, *h0, *c0, *grad_y, *grad_final, *diagonal;
  // jacobian: the diagonals of W_hh, (gates, hidden); with a projection W_hh[gj, p] W_hr[p, j], in the shape of W_hh.
  const T* w_hh_diag;
  T* carry;   // out: gradient of the initial state (batch, states)
  T* grad_x;  // out; null: not wanted
  T *grad_w_ih, *grad_w_hh, *grad_w_hr;
  T *grad_b_ih, *grad_b_hh;  // out; null without biases
  T* residual;               // (rows, states); null without corrections
};

template <class T>
void layer_forward(const LayerForwardArgs<T>&);
template <class T>
void layer_backward(const LayerBackwardArgs<T>&);

}  // namespace statefeed
