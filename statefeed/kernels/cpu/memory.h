// Aligned memory that a thread keeps from call to call, because fresh pages cost more than what is done with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace statefeed {

enum class Use {
  input_weights, hidden_weights, shared_weights, own_weights, d, d_hidden, states_before, inputs, states, gates, rounded
};

template <class T, Use>
T* scratch(int64_t count) {
  constexpr std::align_val_t line{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, line); }
  };
  thread_local std::unique_ptr<T, Free> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset();
    memory.reset(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count), line)));
    size = count;
  }
  return memory.get();
}

}  // namespace statefeed
