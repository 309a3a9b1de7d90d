// Who works on what: a team of torch's threads that takes the parts of one phase after another.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

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

// The part of 0 .. total that rank r of `ranks` works on.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t total, int64_t rank, int64_t ranks) {
  return {total * rank / ranks, total * (rank + 1) / ranks};
}

inline int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What the members of a team know of each other. Nobody waits for a member, only for parts that a member has taken:
// where the machine is busy and a thread comes late, or never, the others do its parts.
struct Team {
  struct alignas(64) Taken {
    std::atomic<uint64_t> parts{0};  // of one member's own share: the phase in the upper half, their count in the lower
  };
  explicit Team(int64_t ranks) : taken(static_cast<size_t>(ranks)) {}
  std::vector<Taken> taken;
  alignas(64) std::atomic<uint32_t> done{0};  // parts of all phases
};

// One thread's walk through the phases, the same for every member.
class Member {
  Team& team;
  const int64_t rank;
  uint64_t phase = 0;
  uint32_t target = 0;
  int64_t slept = 0;  // nanoseconds

  int64_t take(int64_t owner, int64_t size) {  // the next part of the owner's share, -1 if all are taken
    std::atomic<uint64_t>& parts = team.taken[static_cast<size_t>(owner)].parts;
    uint64_t seen = parts.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t at = seen >> 32, next = at < phase ? 0 : seen & 0xffffffffu;
      if (at > phase || next >= static_cast<uint64_t>(size)) return -1;
      if (parts.compare_exchange_weak(seen, (phase << 32) + next + 1)) return static_cast<int64_t>(next);
    }
  }
  bool behind(uint32_t done) const { return static_cast<int32_t>(done - target) < 0; }

  // Spins for some microseconds, then sleeps: an idle core may be what the others' threads are waiting for.
  void wait() {
    constexpr int spins = 1000;
    uint32_t done = team.done.load(std::memory_order_acquire);
    for (int i = 0; i < spins && behind(done); ++i, done = team.done.load(std::memory_order_acquire)) pause();
    if (!behind(done)) return;
    const int64_t start = nanoseconds();
    for (; behind(done); done = team.done.load(std::memory_order_acquire)) team.done.wait(done);
    slept += nanoseconds() - start;
  }

 public:
  Member(Team& members, int64_t own) : team(members), rank(own) {}
  int64_t ranks() const { return static_cast<int64_t>(team.taken.size()); }
  int64_t waited() const { return slept; }

  // Calls body(i) once for every i below `parts`, each on one member, its own share first; returns when all are done.
  template <class Body>
  void divide(int64_t parts, Body body) noexcept {
    if (parts == 0) return;
    ++phase;
    target += static_cast<uint32_t>(parts);
    for (int64_t r = 0; r < ranks(); ++r) {
      const int64_t owner = (rank + r) % ranks();
      const Range own = share(parts, owner, ranks());
      for (int64_t i; (i = take(owner, own.end - own.begin)) >= 0;) {
        body(own.begin + i);
        if (team.done.fetch_add(1, std::memory_order_acq_rel) + 1 == target) team.done.notify_all();
      }
    }
    wait();
  }
};

// A task is items() and run(i); all items of all tasks are divided among the members.
template <class... Task>
void divide(Member& member, const Task&... tasks) {
  member.divide((tasks.items() + ...), [&](int64_t i) {
    auto run = [&](const auto& task) {
      if (i >= 0 && i < task.items()) task.run(i);
      i -= task.items();
    };
    (run(tasks), ...);
  });
}

// Where others keep the cores, a team waits for its members longer than it gains by them. Then one thread does the parts
// of all for a while: what is divided, and so every rounding, stays the same.
class Crowding {
  std::atomic<int64_t> until{0}, patience{16};

 public:
  bool now(int64_t time) const { return time < until.load(std::memory_order_relaxed); }
  void learn(int64_t end, int64_t took, int64_t waited) {
    const bool crowded = 2 * waited > took;
    const int64_t times = crowded ? patience.load(std::memory_order_relaxed) : 8;
    if (crowded) until.store(end + times * took, std::memory_order_relaxed);
    patience.store(std::min<int64_t>(2 * times, 512), std::memory_order_relaxed);
  }
};

inline Crowding crowding;

// Calls body(member) on as many threads as the work, in multiply-adds, is worth; they hold what products of type P need.
template <class P, class Body>
void with_team(int64_t work, Body body) {
  constexpr int64_t worth_a_thread = 2000000;  // some 30 microseconds
  const int64_t ranks = std::clamp<int64_t>(work / worth_a_thread, 1, std::max<int64_t>(thread_count(), 1)), start = nanoseconds();
  Team team(ranks);
  int64_t idle = 0;  // of the caller
  auto walk = [&](int64_t rank) {
    FlushDenormals flush;
    [[maybe_unused]] typename P::Held held;
    Member member(team, rank);
    body(member);
    if (rank == 0) idle = member.waited() - nanoseconds();
  };
  void (*walk_of)(int64_t, int64_t, void*) = [](int64_t begin, int64_t, void* context) {
    (*static_cast<decltype(walk)*>(context))(begin);
  };
  if (ranks == 1 || crowding.now(start)) return walk_of(0, 1, &walk);
  run_parallel(ranks, walk_of, &walk);
  const int64_t end = nanoseconds();
  crowding.learn(end, end - start, end + idle);
}

}  // namespace statefeed
