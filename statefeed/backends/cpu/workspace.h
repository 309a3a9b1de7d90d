// Aligned memory that a thread reuses from call to call: faulting in new pages costs more than computing on them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace statefeed {

// std::bad_alloc, and so a MemoryError in Python, that says how much was asked for. Its message needs no memory.
class OutOfMemory : public std::bad_alloc {
  char message[96];

 public:
  explicit OutOfMemory(size_t bytes) {
    std::snprintf(message, sizeof message, "statefeed's kernels cannot allocate %zu bytes of workspace: out of memory",
                  bytes);
  }
  const char* what() const noexcept override { return message; }
};

class AlignedBuffer {
  static constexpr size_t page = 4096, huge_page = size_t{1} << 21;
  void* memory = nullptr;
  size_t capacity = 0;  // bytes

  void release() {
    std::free(memory);
    memory = nullptr;
    capacity = 0;
  }

 public:
  AlignedBuffer() = default;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { release(); }

  // At least `bytes` of memory; what it held is lost when it grows. OutOfMemory leaves it empty and usable.
  void* reserve(size_t bytes) {
    if (bytes <= capacity) return memory;
    release();
    const size_t rounded_up = (bytes + page - 1) / page * page;
    memory = std::aligned_alloc(page, rounded_up);
    if (!memory) throw OutOfMemory(rounded_up);
    capacity = rounded_up;
#if defined(__linux__)
    // Rows that are far apart are in different pages, more of them than the processor's TLB holds.
    if (capacity >= huge_page) madvise(memory, capacity, MADV_HUGEPAGE);
#endif
    return memory;
  }
};

// What a workspace holds. Two uses that overlap in time in one thread need two tags.
enum class Tag {
  input_weights,
  hidden_weights,
  shared_weights,
  separate_weights,
  gate_grads,
  projection_weights,
  steps_projection_weights,
  diagonal_weights,
  unprojected,
  output_grads,
  unprojected_grads,
  output_diagonal,
  output_tiles,
  unprojected_panels,
  panels,
  hidden_panels,
  states_before,
  inputs,
  states,
  weight_grads,
  state_weight_grads,
  gates,
  biases,
  packed_rows,
  packed_errors,
  exponentials,
  strip_maxima,
  target_logits,
  logits,
};

// `count` elements of this thread's buffer for this type and tag: valid until the next call with both; freed when the
// thread ends. Throws OutOfMemory, so it is never called where nothing may throw.
template <class T, Tag>
T* workspace(int64_t count) {
  thread_local AlignedBuffer buffer;
  return static_cast<T*>(buffer.reserve(sizeof(T) * static_cast<size_t>(std::max<int64_t>(count, 0))));
}

}  // namespace statefeed
