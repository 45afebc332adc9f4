#include "simt/block.h"

#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>

#include "simt/count.h"
#include "simt/memory.h"
#include "simt/segv.h"
#include "simt/tsan.h"

namespace simt {

thread_local constinit Thread* self __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

// Everything an OS thread needs to run blocks in sequence.
struct Scheduler {
  std::vector<std::unique_ptr<Thread>> threads;  // their stacks are reused
  std::vector<Thread*> ready;
  Thread main;  // the OS thread itself
  Block block;
  Shared shared;
  Counts counts;
  const Launch* launch = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string fault;
  uint64_t random = 1;
  int64_t steps = 0;
};
thread_local Scheduler* scheduler = nullptr;

std::string text(const Site& site) {
  const char* file = site.file_name();
  if (const char* slash = strrchr(file, '/')) file = slash + 1;
  return std::string(file) + ":" + std::to_string(site.line());
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && !strcmp(a.file_name(), b.file_name());
}

void go(Thread* to, bool ends = false) {
  Thread* from = self;
  self = to;
  switch_fiber(from->fiber, to->fiber, ends);
}

// Returns a ready thread; the scheduler's if none is ready.
Thread* choose() {
  const Quiet quiet;
  Scheduler& s = *scheduler;
  if (++s.steps > options().max_steps) fail("stuck: too many switches of threads", self->site);
  if (s.ready.empty()) return &s.main;
  if (!options().seed) {
    Thread* first = s.ready.front();
    s.ready.erase(s.ready.begin());
    return first;
  }
  Thread*& drawn = s.ready[(uint64_t(random_number()) * s.ready.size()) >> 32];
  Thread* thread = drawn;
  drawn = s.ready.back();
  s.ready.pop_back();
  return thread;
}

void next(bool ends = false) {
  Thread* thread = choose();
  if (thread != self) go(thread, ends);
}

// On a GPU a warp arrives at a barrier as a whole: bar.sync counts it as 32 threads.
void check_full_warps(const Barrier& barrier) {
  for (const Warp& warp : scheduler->block.warps) {
    const Thread *in = nullptr, *out = nullptr;  // a lane that is in the barrier, one that is not
    for (uint32_t lanes = warp.live; lanes; lanes &= lanes - 1) {
      const Thread* t = warp.thread[__builtin_ctz(lanes)];
      const bool is_waiting = t->waits_at == &barrier && (!in || same(in->site, t->site));
      (is_waiting ? in : out) = t;
    }
    if (in && out)
      fail("barrier of a part of a warp: thread " + std::to_string(out->number) + " is not in it",
           in->site);
  }
}

void open(Barrier& barrier) {
  check_full_warps(barrier);
  for (Thread* t : barrier.waiting) t->waits_at = nullptr;
  join_at_barrier(barrier.waiting);
  acquire(&barrier);
  for (Thread* t : barrier.waiting) {
    release(t);
    scheduler->ready.push_back(t);
  }
  barrier.waiting.clear();
}

void open_if_complete(Barrier& barrier) {
  const int expected = barrier.expected ? barrier.expected : scheduler->block.live;
  if (!barrier.waiting.empty() && static_cast<int>(barrier.waiting.size()) >= expected)
    open(barrier);
}

void end_thread() {
  const Quiet quiet;
  Scheduler& s = *scheduler;
  const auto pending = [](const auto& copies) { return !copies.empty(); };
  if (pending(self->open) || std::any_of(self->groups.begin(), self->groups.end(), pending))
    fail("returns with cp.async copies that it has not waited for", self->site);
  self->finished = true;
  self->warp->live &= ~(1u << self->lane);
  --s.block.live;
  open_if_complete(s.block.barriers[0]);  // as on a GPU, barriers ignore threads that returned
  release(&s.main);
}

void thread_main() {
  Scheduler& s = *scheduler;
  arrived(self->fiber, s.main.fiber);
  acquire(&s.ready);
  (*s.kernel)();
  end_thread();
  next(true);
  __builtin_unreachable();
}

std::string deadlock() {
  std::string message = "deadlock:";
  std::vector<std::string> reported;
  for (Warp& warp : scheduler->block.warps)
    for (Thread* t : warp.thread) {
      if (!t || t->finished) continue;
      const std::string wait = std::string(t->waits_in) + " at " + text(t->site);
      if (std::find(reported.begin(), reported.end(), wait) != reported.end()) continue;
      reported.push_back(wait);
      message += (reported.size() > 1 ? ", thread " : " thread ") + std::to_string(t->number) +
                 " waits in " + wait;
    }
  return message;
}

std::string describe(const Thread& t) {
  const uint3 b = scheduler->block.index;
  char buffer[160];
  std::snprintf(buffer, sizeof buffer, " [kernel %s, block %u,%u,%u, thread %u,%u,%u]",
                scheduler->launch->name, b.x, b.y, b.z, t.index.x, t.index.y, t.index.z);
  return buffer;
}

void run_block(Scheduler& s, const Launch& launch, uint64_t number) {
  const dim3 dim = launch.block, grid = launch.grid;
  const int threads = static_cast<int>(dim.x * dim.y * dim.z);
  Block& block = s.block;
  block.index = {static_cast<unsigned>(number % grid.x),
                 static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.number = static_cast<uint32_t>(number);
  block.acquired.clear();
  block.dim = dim;
  block.grid = grid;
  block.live = threads;
  for (Barrier& b : block.barriers) b.waiting.clear();
  block.warps.assign((threads + 31) / 32, Warp{});
  for (size_t w = 0; w < block.warps.size(); ++w) {
    block.warps[w].clocks.assign(block.warps.size(), 0);
    block.warps[w].clocks[w] = 1;
  }
  s.random = (options().seed * 0x9E3779B97F4A7C15ull ^ number * 0xD1B54A32D192ED03ull) | 1;
  for (int i = 0; i < 4; ++i) random_number();
  s.shared.begin(launch.shared);
  s.counts.begin(threads);
  block.shared = &s.shared;
  block.counts = &s.counts;
  s.ready.clear();
  while (static_cast<int>(s.threads.size()) < threads)
    s.threads.push_back(std::make_unique<Thread>());
  for (int i = 0; i < threads; ++i) {
    Thread& t = *s.threads[i];
    t.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
    t.lane = i % 32;
    t.number = i;
    t.block = &block;
    t.warp = &block.warps[i / 32];
    t.finished = false;
    t.waits_at = nullptr;
    t.open.clear();
    t.groups.clear();
    t.fences = 0;
    t.read.clear();
    t.released.clear();
    t.warp->thread[t.lane] = &t;
    t.warp->live |= 1u << t.lane;
    prepare(t.fiber, thread_main);
    s.ready.push_back(&t);
  }
  self = &s.main;
  adopt(s.main.fiber);
  // s.ready orders the code before the block before its threads, s.main orders the ends of the
  // threads before the code after it
  release(&s.ready);
  next();
  acquire(&s.main);
  if (s.fault.empty() && block.live) {
    for (int i = 0; i < threads; ++i)
      if (!s.threads[i]->finished) {
        s.fault = deadlock() + describe(*s.threads[i]);
        break;
      }
  }
  s.counts.end(launch.name, block);
}

}  // namespace

EmulatorOptions& options() {
  static EmulatorOptions instance;
  return instance;
}

std::vector<Launch>& dry_launches() {
  static std::vector<Launch> instance;
  return instance;
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  const int64_t threads = int64_t(launch.block.x) * launch.block.y * launch.block.z;
  const int64_t blocks = int64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  const auto refuse = [&](const std::string& message) {
    throw Fault(message + " [kernel " + launch.name + "]");
  };
  if (launch.block.x > 1024 || launch.block.y > 1024 || launch.block.z > 64 || threads < 1 ||
      threads > 1024)
    refuse(std::to_string(launch.block.x) + " x " + std::to_string(launch.block.y) + " x " +
           std::to_string(launch.block.z) + " threads a block");
  if (launch.grid.y > 65535 || launch.grid.z > 65535 || launch.grid.x > 2147483647u)
    refuse("grid over the limit of an axis");
  if (launch.shared > kMaxDynamic)
    refuse(std::to_string(launch.shared) + " bytes of dynamic shared memory");
  if (options().dry) return dry_launches().push_back(launch);
  // blocks in a random order, so that no kernel relies on one
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (uint64_t r = options().seed)
    for (int64_t i = blocks - 1; i > 0; --i) {
      r = r * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(order[i], order[(r >> 33) % (i + 1)]);
    }
  std::string fault;
  // the first faulty block in `order`, so that every run reports the same one
  int64_t faulty = blocks;
  std::mutex mutex;
  const SegvGuard guard(launch.name);
  if (options().races) begin_races();
  release(const_cast<Launch*>(&launch));  // ThreadSanitizer does not see OpenMP's own barriers
#pragma omp parallel if (!options().races)
  {
    static thread_local std::unique_ptr<Scheduler> of_thread;
    if (!of_thread) of_thread = std::make_unique<Scheduler>();
    scheduler = of_thread.get();
    acquire(const_cast<Launch*>(&launch));
    const SegvStack stack;
    Scheduler& s = *scheduler;
    s.launch = &launch;
    s.kernel = &kernel;
    s.steps = 0;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks; ++i) {
      s.fault.clear();
      run_block(s, launch, order[i]);
      const std::lock_guard lock(mutex);
      if (s.fault.empty() || i > faulty) continue;
      fault = s.fault;
      faulty = i;
    }
    self = nullptr;
    release(&faulty);
  }
  acquire(&faulty);
  if (!fault.empty()) throw Fault(fault);
}

void fail(const std::string& message, const Site& site) {
  Scheduler& s = *scheduler;
  s.fault = message + " at " + text(site) + describe(*self);
#if defined(SIMT_TSAN)  // ThreadSanitizer cannot abandon fibers
  std::fprintf(stderr, "simt: %s\n", s.fault.c_str());
  std::_Exit(1);
#endif
  go(&s.main, true);  // abandons the block's other threads
  __builtin_unreachable();
}

uint32_t random_number() {
  uint64_t& r = scheduler->random;
  r ^= r << 13;
  r ^= r >> 7;
  r ^= r << 17;
  return static_cast<uint32_t>(r >> 16);
}

void yield() {
  const Quiet quiet;
  scheduler->ready.push_back(self);
  next();
}

void maybe_yield() {
  const int preempt = options().preempt;
  if (preempt && options().seed && random_number() % preempt == 0) yield();
}

void barrier(int number, int expected, const Site& site) {
  const Quiet quiet;
  Thread* t = self;
  if (number < 0 || number > 15) fail("there is no barrier " + std::to_string(number), site);
  if (expected % 32 || expected < 0)
    fail("barrier of " + std::to_string(expected) + " threads: expected whole warps", site);
  Barrier& b = scheduler->block.barriers[number];
  t->waits_in = number ? "a named barrier" : "__syncthreads";
  t->waits_at = &b;
  t->site = site;
  if (!b.waiting.empty()) {
    if (b.expected != expected)
      fail("barrier " + std::to_string(number) + " of " + std::to_string(expected) +
               " threads, of others " + std::to_string(b.expected),
           site);
    if (number == 0 && !same(b.site, site))
      fail("divergent __syncthreads: others wait at " + text(b.site), site);
  }
  b.site = site;
  b.expected = expected;
  release(&b);
  b.waiting.push_back(t);
  open_if_complete(b);
  next();
  acquire(t);
}

void collective(uint32_t mask, const char* name, void* argument, Operation operation,
                const Site& site) {
  const Quiet quiet;
  Thread* t = self;
  Warp& w = *t->warp;
  const int lane = t->lane;
  t->waits_in = name;
  t->site = site;
  if (!(mask >> lane & 1)) fail(std::string(name) + ": its own lane is not in the mask", site);
  if (mask & ~w.live)
    fail(std::string(name) + ": the mask names lanes that have returned or do not exist", site);
  w.waiting |= 1u << lane;
  w.mask[lane] = mask;
  w.argument[lane] = argument;
  w.operation[lane] = operation;
  for (uint32_t others = mask & w.waiting; others; others &= others - 1) {
    const int o = __builtin_ctz(others);
    const Thread& other = *w.thread[o];
    if (w.mask[o] != mask || w.operation[o] != operation || !same(other.site, site))
      fail(std::string(name) + ": lane " + std::to_string(o) + " of its mask is in " +
               other.waits_in + " at " + text(other.site) +
               (w.mask[o] != mask ? ", with another mask" : ""),
           site);
  }
  release(&w);
  if ((w.waiting & mask) == mask) {
    acquire(&w);
    w.waiting &= ~mask;
    operation(w.argument, mask, site);
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
      Thread* o = w.thread[__builtin_ctz(lanes)];
      release(o);
      scheduler->ready.push_back(o);
    }
  }
  next();
  acquire(t);
}

}  // namespace simt
