// A team of torch's threads that runs one parallel loop after another.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace statefeed {

int64_t thread_count();
// Calls body(begin, end, context) on torch's pool so that the ranges cover 0 .. ranks.
void run_parallel(int64_t ranks, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Denormals count as zero while this exists: they slow a product down several times.
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

struct Range {
  int64_t begin, end;
};

// The part of 0 .. total that belongs to rank `rank` of `ranks`.
inline Range range_of(int64_t total, int64_t rank, int64_t ranks) {
  return {total * rank / ranks, total * (rank + 1) / ranks};
}

inline int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What the workers of a team share. A worker never waits for another worker, only for items that another has claimed:
// where the machine is busy and a thread comes late, or never, the others run its items.
class ThreadTeam {
  friend class Worker;
  struct alignas(64) Claimed {
    std::atomic<uint64_t> items{
        0};  // of one worker's range: the loop's number in the upper half, the count in the lower
  };
  std::vector<Claimed> claimed;
  alignas(64) std::atomic<uint32_t> done{0};  // items of all loops
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first item that failed

 public:
  explicit ThreadTeam(int64_t ranks) : claimed(static_cast<size_t>(ranks)) {}

  // Runs body(), unless something has failed before. What it throws is stored for `rethrow`: no exception may leave a
  // thread of the pool, and an item that fails must still count as done, or the others would wait for it forever.
  template <class Body>
  void run(Body&& body) noexcept {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      body();
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
  // For the caller, once every thread is at its end.
  void rethrow() const {
    if (error) std::rethrow_exception(error);
  }
};

// One thread's walk through the loops, in the same order on every worker.
class Worker {
  ThreadTeam& team;
  const int64_t rank;
  uint64_t loop = 0;
  uint32_t target = 0;  // what `done` reaches at the end of this loop
  int64_t slept = 0;    // nanoseconds

  // The next item of the range of rank `owner`, which has `size`; -1 if all are claimed.
  int64_t claim(int64_t owner, int64_t size) {
    std::atomic<uint64_t>& items = team.claimed[static_cast<size_t>(owner)].items;
    uint64_t seen = items.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t at = seen >> 32, next = at < loop ? 0 : seen & 0xffffffffu;
      if (at > loop || next >= static_cast<uint64_t>(size)) return -1;
      if (items.compare_exchange_weak(seen, (loop << 32) + next + 1)) return static_cast<int64_t>(next);
    }
  }
  bool incomplete(uint32_t done) const { return static_cast<int32_t>(done - target) < 0; }

  // Spins, then sleeps: a core that spins may be the one that the others' threads wait for.
  void wait() {
    // 24 microseconds on an AMD EPYC 9005 (Zen 5), where two running threads meet in 0.1 (both measured with loops of
    // two empty items). The number itself is an estimate: much longer than such a meeting, much shorter than a time
    // slice.
    constexpr int spins = 1000;
    uint32_t done = team.done.load(std::memory_order_acquire);
    for (int i = 0; i < spins && incomplete(done); ++i, done = team.done.load(std::memory_order_acquire)) pause();
    if (!incomplete(done)) return;
    const int64_t start = nanoseconds();
    for (; incomplete(done); done = team.done.load(std::memory_order_acquire)) team.done.wait(done);
    slept += nanoseconds() - start;
  }

 public:
  Worker(ThreadTeam& of, int64_t own_rank) : team(of), rank(own_rank) {}
  int64_t ranks() const { return static_cast<int64_t>(team.claimed.size()); }
  int64_t waited() const { return slept; }

  // Calls body(i) once for every i below `items`, each on one worker, its own range first; returns when all are done.
  // After a failure the remaining calls are skipped, here and in later loops.
  template <class Body>
  void parallel_for(int64_t items, Body body) {
    if (items == 0) return;
    ++loop;
    target += static_cast<uint32_t>(items);
    for (int64_t r = 0; r < ranks(); ++r) {
      const int64_t owner = (rank + r) % ranks();
      const Range range = range_of(items, owner, ranks());
      for (int64_t i; (i = claim(owner, range.end - range.begin)) >= 0;) {
        team.run([&] { body(range.begin + i); });
        if (team.done.fetch_add(1, std::memory_order_acq_rel) + 1 == target) team.done.notify_all();
      }
    }
    wait();
  }
};

// The same over the items of several tasks at once; a task has items() and run(i).
template <class... Task>
void parallel_for(Worker& worker, const Task&... tasks) {
  worker.parallel_for((tasks.items() + ...), [&](int64_t i) {
    auto run = [&](const auto& task) {
      if (i >= 0 && i < task.items()) task.run(i);
      i -= task.items();
    };
    (run(tasks), ...);
  });
}

// Where other processes use the cores, a team waits for its workers longer than it gains by them. Then one thread runs
// all items for a while; how the work is divided, and so every rounding, stays the same.
class OversubscriptionGuard {
  // In units of a call's own time. Estimates: 8 calls cost less than a percent where the machine is free again, 512
  // calls of a busy machine try the team again a few times a second.
  static constexpr int64_t first_backoff = 8, most_backoff = 512;
  std::atomic<int64_t> until{0}, backoff{2 * first_backoff};

 public:
  bool active(int64_t time) const { return time < until.load(std::memory_order_relaxed); }
  // A call that ended at `end` took `took` nanoseconds, `waited` of them asleep in its first thread.
  void record(int64_t end, int64_t took, int64_t waited) {
    const bool oversubscribed = 2 * waited > took;
    const int64_t times = oversubscribed ? backoff.load(std::memory_order_relaxed) : first_backoff;
    if (oversubscribed) until.store(end + times * took, std::memory_order_relaxed);
    backoff.store(std::min(2 * times, most_backoff), std::memory_order_relaxed);
  }
};

inline OversubscriptionGuard oversubscription_guard;

// Calls body(worker) on as many threads as `work`, in multiply-adds, is worth; each holds what products of traits P
// need. Throws what the first failure threw, on any thread.
template <class P, class Body>
void run_team(int64_t work, Body body) {
  // 17 to 40 microseconds of one core at 50 to 120 billion multiply-adds a second (float32). On a Zen 5 an empty
  // parallel region takes 0.4 microseconds while the pool is awake. Estimate: tens of microseconds where it sleeps, and
  // then a second thread gains nothing below this.
  constexpr int64_t min_work_per_thread = 2000000;
  const int64_t ranks = std::clamp<int64_t>(work / min_work_per_thread, 1, std::max<int64_t>(thread_count(), 1));
  const int64_t start = nanoseconds();
  ThreadTeam team(ranks);
  int64_t slept = 0, finished = start;  // of the first thread
  auto walk = [&](int64_t rank) {
    FlushDenormals flush;
    [[maybe_unused]] typename P::TileConfigGuard tiles;
    Worker worker(team, rank);
    team.run([&] { body(worker); });
    if (rank == 0) slept = worker.waited(), finished = nanoseconds();
  };
  if (ranks == 1 || oversubscription_guard.active(start)) {
    walk(0);
  } else {
    void (*walk_of)(int64_t, int64_t, void*) = [](int64_t begin, int64_t, void* context) {
      (*static_cast<decltype(walk)*>(context))(begin);
    };
    run_parallel(ranks, walk_of, &walk);
    const int64_t end = nanoseconds();
    oversubscription_guard.record(end, end - start, slept + end - finished);
  }
  team.rethrow();
}

}  // namespace statefeed
