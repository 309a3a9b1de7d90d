// Checks of what the operators are given: each raises one sentence with what, expected and got.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "cells/table.h"

namespace statefeed {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "dtype " + std::to_string(static_cast<int>(dtype));
  }
}

// A name in an operator's arguments. torch's own conversion to std::string leaks one string a call (torch 2.13).
class Name {
  StringHandle handle;

 public:
  explicit Name(StringHandle from) : handle(from) {}
  Name(const Name&) = delete;
  ~Name() { torch_delete_string(handle); }
  std::string_view view() const {
    size_t length = 0;
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    return {text, length};
  }
};

inline const CellEntry& find_cell(std::string_view name) {
  for (const CellEntry* cell : cell_table)
    if (cell->name == name) return *cell;
  std::string known;
  for (const CellEntry* cell : cell_table) known += (known.empty() ? "" : ", ") + std::string(cell->name);
  STD_TORCH_CHECK(false, "no kernel for the cell '", name, "': expected one of ", known);
}

inline Rule find_rule(std::string_view name) {
  if (name == "stationary") return Rule::stationary;
  if (name == "per_row") return Rule::per_row;
  if (name == "direct") return Rule::direct;
  if (name == "jacobian") return Rule::jacobian;
  if (name == "exact") return Rule::exact;
  STD_TORCH_CHECK(false, "no kernel for the rule '", name,
                  "': expected one of stationary, per_row, direct, jacobian, exact");
}

// The arguments of one call. Every tensor must be contiguous, on the CPU, and of one dtype unless another is given.
class Checks {
  const char* op;
  ScalarType dtype;

  static void append_shape(std::ostream& to, int64_t dims, auto size) {
    to << "(";
    for (int64_t i = 0; i < dims; ++i) to << (i ? ", " : "") << size(i);
    to << (dims == 1 ? ",)" : ")");
  }
  [[noreturn]] __attribute__((noinline, cold)) void refuse(const char* name, const Tensor& got, ScalarType wanted,
                                                           Shape shape) const {
    std::ostringstream words;
    words << op << ": " << name << " must be a contiguous " << name_of(wanted) << " CPU tensor of shape ";
    append_shape(words, static_cast<int64_t>(shape.size()), [&](int64_t i) { return shape.begin()[i]; });
    words << ", got a " << (got.is_contiguous() ? "contiguous " : "strided ") << name_of(got.scalar_type())
          << (got.is_cpu() ? " CPU" : " non-CPU") << " tensor of shape ";
    append_shape(words, got.dim(), [&](int64_t i) { return got.size(i); });
    STD_TORCH_CHECK(false, words.str());
    __builtin_unreachable();
  }

 public:
  Checks(const char* of, const Tensor& like) : op(of), dtype(like.scalar_type()) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                    ": the kernels compute in float32 or float64, got ", name_of(dtype));
  }
  Checks(const char* of, ScalarType of_all) : op(of), dtype(of_all) {}

  bool is_double() const { return dtype == ScalarType::Double; }

  void dims(const char* name, const Tensor& got, int64_t dims) const {
    STD_TORCH_CHECK(got.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, got ", got.dim());
  }
  void tensor(const char* name, const Tensor& got, Shape shape, ScalarType wanted) const {
    int64_t* sizes = nullptr;  // one call for all sizes: a small layer's checks are as long as its kernel
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(got.get(), &sizes));
    if (got.dim() != static_cast<int64_t>(shape.size()) || !std::equal(shape.begin(), shape.end(), sizes) ||
        got.scalar_type() != wanted || !got.is_contiguous() || !got.is_cpu()) [[unlikely]]
      refuse(name, got, wanted, shape);
  }
  void tensor(const char* name, const Tensor& got, Shape shape) const { tensor(name, got, shape, dtype); }
  // May be None.
  void optional(const char* name, const OptionalTensor& got, Shape shape) const {
    if (got) tensor(name, *got, shape);
  }
  // None, or not, as `wanted` says.
  void optional(const char* name, const OptionalTensor& got, bool wanted, const char* when, Shape shape) const {
    STD_TORCH_CHECK(got.has_value() == wanted, op, ": ", name, wanted ? " must be given " : " must be None except ",
                    when, wanted ? ", got None" : ", got a tensor");
    optional(name, got, shape);
  }
  template <class... Words>
  void that(bool condition, const Words&... words) const {
    STD_TORCH_CHECK(condition, op, ": ", words...);
  }
};

}  // namespace statefeed
