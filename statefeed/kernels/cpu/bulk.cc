// The large products for float and double.
#include "kernels.h"

namespace statefeed {

template <class T>
void run_product(const Product<T>& s) {
  product(s);
}
template void run_product<float>(const Product<float>&);
template void run_product<double>(const Product<double>&);

template <class T>
void run_row_products(const RowSum<T>& s) {
  add_row_products(s);
}
template void run_row_products<float>(const RowSum<float>&);
template void run_row_products<double>(const RowSum<double>&);

}  // namespace statefeed
