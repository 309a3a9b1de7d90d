// LSTM without a projection: the output of the cell is h = o tanh(c).
// Each cell is a translation unit of its own so that the loops, most of the compile time, are compiled in parallel.
#include "lstm.h"

namespace statefeed {

constinit const CellEntry lstm_cell = cell_entry<Lstm>("lstm");

}  // namespace statefeed
