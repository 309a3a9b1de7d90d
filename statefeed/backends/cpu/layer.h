// One layer in one direction, in chunks of time that stay in cache: the arguments.
#pragma once

#include "steps.h"

namespace statefeed {

template <class T>
struct CellKernels;

template <class T>
struct Layer : Stretch<T> {
  const CellKernels<T>* cell;
  int64_t inputs;
  bool rounded;  // products of bfloat16
  const T *x, *w_ih, *w_hh;
};

template <class T>
struct LayerForward : Layer<T> {
  const T *bias, *hidden_bias, *h0;
  T *gates, *extra, *y, *c;  // gates, extra: null if no backward follows; gates: y for an RNN
};

template <class T>
struct LayerBackward : Layer<T> {
  Diagonal rule;
  bool exact;
  int64_t corrections;
  const T *gates, *extra, *y, *h0, *c0, *e, *final_e, *diagonal;
  T *carry, *d_x, *d_ih, *d_hh, *sums, *residual;  // d_x: null if not wanted; residual: (rows, states * hidden) or null
};

}  // namespace statefeed
