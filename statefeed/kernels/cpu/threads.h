// Who works on what: torch's thread pool, a barrier between steps, and denormals flushed while a thread works.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace statefeed {

int64_t thread_count();
// Calls body(begin, end, context) on torch's pool so that the ranges cover 0 .. ranks.
void run_parallel(int64_t ranks, void (*body)(int64_t begin, int64_t end, void* context), void* context);

class FlushDenormals {
#if defined(__SSE__)
  unsigned mode = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(mode | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  uint64_t mode;

 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    asm volatile("msr fpcr, %0" ::"r"(mode | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(mode)); }
#else
 public:
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
};

inline void pause() {
#if defined(__SSE__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A step needs the whole state of the step before: everyone waits here, spinning for a few microseconds and then
// giving the core away, so that a busy machine slows it down but cannot stop it.
class Barrier {
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> phase{0};

 public:
  void wait(int64_t arriving, int64_t total) {
    const int64_t before = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(arriving, std::memory_order_acq_rel) + arriving == total) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(before + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase.load(std::memory_order_acquire) == before; ++spins)
      if (spins < 4096)
        pause();
      else
        std::this_thread::yield();
  }
};

// Only one team may wait on barriers at a time: two teams sharing a pool of few threads could wait for each other.
inline std::mutex& barrier_team() {
  static std::mutex mutex;
  return mutex;
}

// The part of 0 .. total that rank r of `ranks` works on.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t total, int64_t rank, int64_t ranks) {
  return {total * rank / ranks, total * (rank + 1) / ranks};
}

template <class Body>
void each_rank(int64_t ranks, Body body) {  // body(begin, end): the ranks one thread stands for
  auto call = [](int64_t begin, int64_t end, void* context) {
    FlushDenormals flush;
    (*static_cast<Body*>(context))(begin, end);
  };
  if (ranks == 1)
    call(0, 1, &body);
  else
    run_parallel(ranks, call, &body);
}

}  // namespace statefeed
