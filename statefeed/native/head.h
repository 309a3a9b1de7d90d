// The loss of a softmax head over rows: the arguments.
#pragma once

#include <cstdint>

namespace statefeed {

struct HeadLossArgs {
  int64_t rows, inputs, classes;
  bool bf16;                           // products of operands converted to bfloat16
  const float *x, *w, *bias;           // (rows, inputs), (classes, inputs), (classes)
  const int64_t* targets;              // (rows), from 0 to classes - 1
  float* losses;                       // out: (rows)
  float *grad_x, *grad_w, *grad_bias;  // out, shaped as x, w and bias; all null if no gradient is wanted
};

void run_head_loss(const HeadLossArgs&);

}  // namespace statefeed
