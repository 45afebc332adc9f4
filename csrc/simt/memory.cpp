#include "simt/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <unordered_map>

#include "simt/count.h"
#include "simt/tsan.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SIMT_POISON(p, n) __asan_poison_memory_region(p, n)
#define SIMT_UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define SIMT_POISON(p, n)
#define SIMT_UNPOISON(p, n)
#endif

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStaticCapacity = 2 * kMaxStatic;  // with alignment and gaps
constexpr size_t kGap = 64;    // between shared variables, so that an overrun is found
constexpr int kPoison = 0xff;  // NaN as float32, bfloat16 and float16; -1 as an integer

struct TensorBytes {
  const char *begin, *end;
  const char* name;
  bool writable;
};
std::vector<TensorBytes> ranges;
// The shadow of global memory, keyed by address / 1 KiB
std::unordered_map<uintptr_t, std::unique_ptr<std::array<Word, 256>>> global_words;

std::string hex(const void* p) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%p", p);
  return buffer;
}

const char* verb(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic access";
}

// Calls f(word number, mask of its bytes) for every word of [offset, offset + bytes).
template <class F>
void each_word(uintptr_t offset, uintptr_t bytes, F&& f) {
  for (uintptr_t end = offset + bytes; offset < end;) {
    const uintptr_t first = offset % 4, count = std::min(4 - first, end - offset);
    f(offset / 4, static_cast<uint8_t>(((1u << count) - 1) << first));
    offset += count;
  }
}

Access access_of(const Stamp& s) { return static_cast<Access>(s.access); }

void refuse_race(const Stamp& before, const void* p, const Site& site) {
  const Shared& shared = *self->block->shared;
  std::string who = "race: thread " + std::to_string(before.thread);
  if (before.block != self->block->number) who += " of block " + std::to_string(before.block);
  fail(who + (access_of(before) == Access::read ? " read" : " wrote") +
           " these bytes, and nothing orders the two (" +
           (shared.contains(p) ? shared.describe(p) : hex(p)) + ")",
       site);
}

void access_global(const void* address, size_t size, Access access, const Site& site) {
  const char* p = static_cast<const char*>(address);
  const TensorBytes *nearest = nullptr, *input = nullptr;
  for (const TensorBytes& r : ranges) {
    if (p >= r.begin && p + size <= r.end) {
      if (access != Access::read && !r.writable) {  // the same memory may also be an output
        input = &r;
        continue;
      }
      if (options().races)
        each_word(reinterpret_cast<uintptr_t>(p), size, [&](uintptr_t w, uint8_t mask) {
          auto& page = global_words[w / 256];
          if (!page) page = std::make_unique<std::array<Word, 256>>();
          (*page)[w % 256].touch(mask, access, p, site);
        });
      return;
    }
    const auto distance = [&](const TensorBytes& x) {
      return p < x.begin ? x.begin - p : p + size > x.end ? p + size - x.end : 0;
    };
    if (!nearest || distance(r) < distance(*nearest)) nearest = &r;
  }
  if (input) fail(std::string(verb(access)) + " of '" + input->name + "', which is an input", site);
  std::string where = "of no tensor";
  if (nearest && p < nearest->begin)
    where = std::to_string(nearest->begin - p) + " bytes before '" + nearest->name + "'";
  else if (nearest)
    where = std::to_string(p - nearest->begin) + " bytes into '" + nearest->name + "', which has " +
            std::to_string(nearest->end - nearest->begin);
  fail("out of bounds: " + std::string(verb(access)) + " of " + std::to_string(size) +
           " bytes at " + hex(address) + ", " + where,
       site);
}

}  // namespace

// Returns a free stamp, or one to overwrite: one of two stamps of a warp, if another warp has one.
Stamp& Word::slot_for(const Stamp& stamp) {
  for (Stamp& s : stamps)
    if (!s.bytes) return s;
  const auto same_kind = [](const Stamp& a, const Stamp& b) {
    return a.access == b.access && a.bytes == b.bytes;
  };
  for (Stamp& s : stamps)
    for (const Stamp& other : stamps)
      if (&s < &other && same_kind(s, stamp) && same_kind(other, stamp) && s.block == other.block &&
          s.thread / 32 == other.thread / 32)
        return s;
  for (Stamp& s : stamps)
    if (same_kind(s, stamp)) return s;
  return stamps[random_number() % std::size(stamps)];
}

void Word::touch(uint8_t bytes, Access access, const void* p, const Site& site) {
  for (Stamp& s : stamps) {
    if (!(s.bytes & bytes)) continue;
    const Access before = access_of(s);
    if (ordered(s)) {  // every access after this one also comes after that one
      if (access != Access::read || before == Access::read) s.bytes &= ~bytes;
    } else if (before != access || access == Access::write) {
      refuse_race(s, p, site);
    }
  }
  Stamp stamp = now();
  stamp.bytes = bytes;
  stamp.access = static_cast<uint16_t>(access);
  slot_for(stamp) = stamp;
  if (access != Access::read) written |= bytes;
}

void begin_races() {
  global_words.clear();
  begin_order();
}

void register_tensor(const void* begin, size_t bytes, const char* name, bool writable) {
  const char* p = static_cast<const char*>(begin);
  ranges.push_back({p, p + bytes, name, writable});
}

void unregister_tensors() { ranges.clear(); }

void check(const void* address, size_t size, size_t alignment, Access access, const Site& site) {
  const Quiet quiet;
  self->site = site;
  maybe_yield();
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    fail("misaligned: " + std::string(verb(access)) + " of " + std::to_string(size) + " bytes at " +
             hex(address),
         site);
  Shared& shared = *self->block->shared;
  const bool is_shared = shared.contains(address);
  if (is_shared)
    shared.access(address, size, access, site);
  else
    access_global(address, size, access, site);
  if (options().count) self->block->counts->note(address, size, access, is_shared, site);
}

void check_global(const void* address, const char* instruction, const Site& site) {
  if (self->block->shared->contains(address))
    fail(std::string(instruction) + ": an address of shared memory", site);
}

void check_constant(const void* address, const char* instruction, const Site& site) {
  check_global(address, instruction, site);
  for (const TensorBytes& r : ranges)
    if (r.writable && address >= r.begin && address < r.end)
      fail(std::string(instruction) + ": of '" + r.name + "', which is an output", site);
}

// [guard][static variables][guard][dynamic, at the end of its capacity][guard]
Shared::Shared() {
  const size_t dynamic_capacity = (kMaxDynamic + 2 * kPage - 1) / kPage * kPage;
  size = kPage + kStaticCapacity + kPage + dynamic_capacity + kPage;
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  base = static_cast<unsigned char*>(p);
  mprotect(base, kPage, PROT_NONE);
  mprotect(base + kPage + kStaticCapacity, kPage, PROT_NONE);
  mprotect(base + size - kPage, kPage, PROT_NONE);
}

Shared::~Shared() { munmap(base, size); }

void Shared::begin(size_t bytes) {
  SIMT_UNPOISON(base + kPage, kStaticCapacity);
  std::memset(base + kPage, kPoison, used);
  used = static_bytes = 0;
  variables.clear();
  SIMT_POISON(base + kPage, kStaticCapacity);
  std::fill(slots.begin(), slots.end(), nullptr);
  // the largest alignment that any instruction needs of a shared address
  dynamic = base + size - kPage - (bytes + 127) / 128 * 128;
  dynamic_bytes = bytes;
  SIMT_UNPOISON(dynamic, bytes);
  std::memset(dynamic, kPoison, base + size - kPage - dynamic);
  SIMT_POISON(dynamic + bytes, base + size - kPage - dynamic - bytes);
  static_words.clear();
  dynamic_words.clear();
}

void* Shared::variable(size_t id, size_t bytes, size_t alignment, const Site& site) {
  const Quiet quiet;
  if (slots.size() <= id) slots.resize(id + 1);
  if (!slots[id]) {
    used = (used + alignment - 1) / alignment * alignment;
    if (used % (2 * alignment) == 0) used += alignment;  // no better aligned than requested
    static_bytes += bytes;
    if (static_bytes + dynamic_bytes > (dynamic_bytes > kDefaultDynamic ? kMaxDynamic : kMaxStatic))
      fail(std::to_string(static_bytes) + " bytes of static shared memory with " +
               std::to_string(dynamic_bytes) + " of dynamic",
           site);
    slots[id] = base + kPage + used;
    variables.push_back({base + kPage + used, base + kPage + used + bytes});
    SIMT_UNPOISON(slots[id], bytes);
    std::memset(slots[id], kPoison, bytes);
    used += bytes + kGap;
  }
  return slots[id];
}

size_t new_variable() {
  static std::atomic<size_t> count{0};
  return count++;
}

std::string Shared::describe(const void* p) const {
  const auto* c = static_cast<const unsigned char*>(p);
  const unsigned char* first = base + kPage;
  if (c >= first + kStaticCapacity)
    return "byte " + std::to_string(c - dynamic) + " of " + std::to_string(dynamic_bytes) +
           " dynamic ones of shared memory";
  return "byte " + std::to_string(c - first) + " of " + std::to_string(used) +
         " static ones of shared memory";
}

void Shared::inside(const void* p, size_t bytes, const Site& site) const {
  const auto* c = static_cast<const unsigned char*>(p);
  for (const auto& [begin, end] : variables)
    if (c >= begin && c + bytes <= end) return;
  if (c >= dynamic && c + bytes <= dynamic + dynamic_bytes) return;
  fail("out of bounds: " + std::to_string(bytes) + " bytes at " + describe(p), site);
}

Word& Shared::word(size_t offset) {
  const size_t of_static = offset - kPage, of_dynamic = offset - this->offset(dynamic);
  auto& words = of_static < kStaticCapacity ? static_words : dynamic_words;
  const size_t number = (of_static < kStaticCapacity ? of_static : of_dynamic) / 4;
  if (words.size() <= number) words.resize(number + 1);
  return words[number];
}

void Shared::access(const void* p, size_t bytes, Access access, const Site& site) {
  inside(p, bytes, site);
  each_word(offset(p), bytes, [&](size_t w, uint8_t mask) {
    Word& shadow = word(4 * w);
    if (shadow.in_flight & mask)
      fail("a cp.async that no one has waited for fills these bytes", site);
    if (access != Access::write && (shadow.written & mask) != mask)
      fail("shared memory that nobody has written is read", site);
    shadow.touch(mask, access, p, site);
  });
}

void Shared::begin_copy(const Copy& copy) {
  each_word(offset(copy.to), copy.bytes,
            [&](size_t w, uint8_t mask) { word(4 * w).in_flight |= mask; });
  std::memset(copy.to, kPoison, copy.bytes);
}

void Shared::end_copy(const Copy& copy, const Site& site) {
  each_word(offset(copy.to), copy.bytes,
            [&](size_t w, uint8_t mask) { word(4 * w).in_flight &= ~mask; });
  access(copy.to, copy.bytes, Access::write, site);
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
}

}  // namespace simt
