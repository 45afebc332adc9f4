// csrc/cpu/base/phases.h alone, on threads of which the first is often away: thousands of short
// phases, each the sum over the phase before it, in two buffers that the phases share.
//
//     phases THREADS PHASES      prints the last phase's values; ends 1 where a unit ran twice
#include "cpu/base/phases.h"

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int WIDTH = 40;

struct Shared {
  uint64_t values[2][WIDTH] = {};  // of the last phase and of this one: plain memory
  std::vector<std::atomic<int>> runs;
  explicit Shared(int phases) : runs(size_t(phases * WIDTH)) {}
};

struct Program {
  Shared& s;
  int count, thread = 0;
  mutable unsigned random = 1;

  void sometimes_sleep(unsigned one_in) const {
    random = random * 1664525u + 1013904223u;
    if (thread == 0 && (random >> 16) % one_in == 0) usleep((random >> 8) % 300);
  }
  int phases() const { return count; }
  int64_t units(int phase) const {
    sometimes_sleep(50);  // between a look at the current phase and the claim
    return phase % 7 == 3 ? 0 : 1 + phase * 13 % WIDTH;
  }
  void run(int phase, int64_t from, int64_t to) {
    sometimes_sleep(20);  // with a claim
    uint64_t total = 0;
    for (uint64_t v : s.values[(phase + 1) % 2]) total = total * 31 + v;
    for (int64_t u = from; u < to; ++u) {
      s.values[phase % 2][u] = total * uint64_t(u + 1) + uint64_t(phase);
      s.runs[size_t(phase * WIDTH + u)].fetch_add(1, std::memory_order_relaxed);
    }
  }
};

}  // namespace

int main(int, char** argv) {
  const int threads = atoi(argv[1]), count = atoi(argv[2]);
  Shared shared(count);
  Program program{shared, count};
  fastlm::Phases phases(program);
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t)
    all.emplace_back([&, t] {
      Program own = program;
      own.thread = t, own.random = unsigned(t);
      phases.work(own, threads);
    });
  for (std::thread& t : all) t.join();
  Program plain{shared, count, 1};
  for (int phase = 0; phase < count; ++phase)
    for (int64_t u = 0; u < WIDTH; ++u)
      if (shared.runs[size_t(phase * WIDTH + u)] != int(u < plain.units(phase))) {
        printf("phase %d: unit %ld ran %d times\n", phase, long(u),
               int(shared.runs[size_t(phase * WIDTH + u)]));
        return 1;
      }
  for (const auto& half : shared.values)
    for (uint64_t v : half) printf("%lx\n", v);
}
