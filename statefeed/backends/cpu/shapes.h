// Checks of the shapes that follow from a cell and its input.
#pragma once

#include "cell.h"
#include "checks.h"

namespace statefeed {

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// The steps of a layer with initial state h0 (batch, output) over `rows` rows.
inline StepRange checked_range(const Checks& checks, int64_t rows, int64_t hidden, const Tensor& h0,
                               const OptionalTensor& batch_sizes) {
  checks.dims("h0", h0, 2);
  StepRange range{
      .steps = 0, .batch = h0.size(0), .hidden = hidden, .output = h0.size(1), .rows = rows, .batch_sizes = nullptr};
  checks.tensor("h0", h0, {range.batch, range.output});
  if (!batch_sizes) {
    range.steps = range.batch ? rows / range.batch : 0;
    checks.that(range.steps * range.batch == rows, "expected rows that are a multiple of the batch of h0, ",
                range.batch, ", got ", rows);
    return range;
  }
  checks.dims("batch_sizes", *batch_sizes, 1);
  range.steps = batch_sizes->size(0);
  checks.tensor("batch_sizes", *batch_sizes, {range.steps}, ScalarType::Long);
  range.batch_sizes = data<int64_t>(batch_sizes);
  int64_t total = 0, before = range.batch;
  for (int64_t t = 0; t < range.steps; ++t) {
    const int64_t size = range.batch_sizes[t];
    checks.that(size > 0 && size <= before, "batch_sizes must be positive and never grow, from the batch of h0, ",
                range.batch, ", got ", size, " after ", before);
    total += before = size;
  }
  checks.that(range.steps == 0 || range.batch_sizes[0] == range.batch, "batch_sizes must begin with the batch of h0, ",
              range.batch, ", got ", range.steps ? range.batch_sizes[0] : 0);
  checks.that(total == rows, "batch_sizes must add up to the rows of the input, ", rows, ", got ", total);
  return range;
}

// Shapes that follow from the cell and the input; rows and inputs as x has them, no inputs without W_ih.
struct Shapes {
  int64_t N, I, B, H, O, G, S;
  int64_t columns;  // of W_hh: the width of h, or the units of a head where it is block-diagonal
};

// H: the width of h, or with a projection the columns of W_hr.
inline int64_t checked_hidden(const Checks& checks, const CellEntry& cell, const Tensor& h0,
                              const OptionalTensor& w_hr) {
  checks.that(w_hr.has_value() == cell.projects, "w_hr must be given for a cell with a projection and no other, got ",
              w_hr ? "a tensor" : "None");
  checks.dims("h0", h0, 2);
  if (w_hr) checks.dims("w_hr", *w_hr, 2);
  return w_hr ? w_hr->size(1) : h0.size(1);
}

// Units per head: the columns of W_hh if they divide the units, which takes gates with one gradient each.
inline int64_t checked_columns(const Checks& checks, const CellEntry& cell, const StepRange& range,
                               const Tensor& w_hh) {
  checks.dims("w_hh", w_hh, 2);
  if (cell.projects) return range.output;
  const int64_t columns = w_hh.size(1), hidden = range.hidden;
  return cell.shared_gates == cell.gates && columns > 0 && hidden % columns == 0 ? columns : hidden;
}

// W_ih or its gradient: an empty vector if x are the preactivations.
inline void check_w_ih(const Checks& checks, const char* name, const Tensor& w_ih, int64_t gates, int64_t inputs) {
  if (inputs)
    checks.tensor(name, w_ih, {gates, inputs});
  else
    checks.tensor(name, w_ih, {0});
}

inline Shapes checked_input(const Checks& checks, const CellEntry& cell, const StepRange& range, const Tensor& x,
                            const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& w_hr) {
  const Shapes shape{.N = range.rows,
                     .I = w_ih.dim() == 1 ? 0 : x.size(1),
                     .B = range.batch,
                     .H = range.hidden,
                     .O = range.output,
                     .G = cell.gates * range.hidden,
                     .S = cell.state_size(range),
                     .columns = checked_columns(checks, cell, range, w_hh)};
  checks.that(shape.H > 0 && x.size(1) > 0, "expected at least one input and one hidden unit, got ", x.size(1), " and ",
              shape.H);
  checks.tensor("x", x, {shape.N, shape.I ? shape.I : shape.G});
  check_w_ih(checks, "w_ih", w_ih, shape.G, shape.I);
  checks.tensor("w_hh", w_hh, {shape.G, shape.columns});
  checks.optional("w_hr", w_hr, {shape.O, shape.H});
  return shape;
}

// What the forward pass saves, as far as the cell saves it.
inline void check_saved(const Checks& checks, const CellEntry& cell, int64_t rows, int64_t hidden,
                        const OptionalTensor& gates, const OptionalTensor& aux, bool wanted) {
  checks.optional("gates", gates, wanted && cell.gates > 1, "for a cell with several gates",
                  {rows, cell.gates * hidden});
  checks.optional("aux", aux, wanted && cell.aux_parts, "for a cell that saves more than its gates",
                  {rows, cell.aux_parts * hidden});
}

// The parts of the state besides h, joined.
inline void check_c(const Checks& checks, const char* name, const CellEntry& cell, const StepRange& range,
                    const OptionalTensor& c) {
  checks.optional(name, c, cell.parts_of_c() > 0, "for a cell with several states",
                  {range.batch, cell.parts_of_c() * range.hidden});
}

}  // namespace statefeed
