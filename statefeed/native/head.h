// The loss of a softmax head over rows: the arguments.
#pragma once

#include <cstdint>

namespace statefeed {

struct HeadLoss {
  int64_t rows, inputs, classes;
  bool rounded;  // products of bfloat16
  const float *x, *w, *bias;  // (rows, inputs), (classes, inputs), (classes)
  const int64_t* targets;     // (rows)
  float *losses;              // out: (rows)
  float *d_x, *d_w, *d_bias;  // out, shaped as x, w and bias; all null if no gradient is wanted
};

void run_head_loss(const HeadLoss&);

}  // namespace statefeed
