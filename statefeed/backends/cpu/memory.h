// Aligned memory that a thread keeps from call to call, because fresh pages cost more than what is done with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace statefeed {

enum class Use {
  input_weights, hidden_weights, shared_weights, own_weights, d, panels, hidden_panels, states_before, inputs, states,
  weight_gradients, state_weight_gradients, gates, rounded
};

// Rows far apart lie in pages of their own, and there are more of those than the processor knows addresses of.
inline void use_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  if (bytes >= size_t{1} << 21) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

template <class T, Use>
T* scratch(int64_t count) {
  constexpr std::align_val_t page{4096};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, page); }
  };
  thread_local std::unique_ptr<T, Free> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset();
    const size_t bytes = sizeof(T) * static_cast<size_t>(count);
    memory.reset(static_cast<T*>(::operator new(bytes, page)));
    use_huge_pages(memory.get(), bytes);
    size = count;
  }
  return memory.get();
}

}  // namespace statefeed
