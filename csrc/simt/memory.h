// Checks every access to memory.
//
// An access by load, store, an atomic, ldmatrix or cp.async must be inside a tensor that the host
// code registered with `register_tensor`, or inside the block's shared memory, which is poisoned
// when the block begins and must be written before it is read. A shadow word for every 4 bytes
// records which threads wrote and read them. Two accesses by different threads, one of which
// writes, must be ordered (order.h); so a race is found in any order of the threads.
// EmulatorOptions::races includes global memory; blocks then run one at a time. Accesses that
// bypass these functions (`p[i]`) are checked only by the sanitizers and by the poison.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "simt/block.h"

namespace simt {

constexpr size_t kMaxStatic = 48 << 10;
constexpr size_t kMaxDynamic = 227 << 10;     // static memory counts towards both limits
constexpr size_t kDefaultDynamic = 32 << 10;  // above this, cuda/launch.h requests kMostDynamic

enum class Access : uint16_t { read, write, atomic };

// A thread's access to some of the 4 bytes (one bit each; 0: no access) and its time.
using Stamp = Moment;

// The shadow of 4 bytes. It stores the writer of each half and two readers. Two readers (or
// atomics) of different warps, or of different lanes, represent any number of them, since a later
// write that is ordered after both is ordered after all. Of many readers of smaller pieces some are
// dropped.
struct Word {
  Stamp stamps[4];
  uint8_t written = 0, in_flight = 0;  // one bit per byte

  void touch(uint8_t bytes, Access access, const void* p, const Site& site);

 private:
  Stamp& slot_for(const Stamp& stamp);
};

// Refuses an access that is misaligned, out of bounds, reads unwritten shared memory, or is not
// ordered after another thread's; counts it.
void check(const void* address, size_t size, size_t alignment, Access access, const Site& site);

// Refuses an address of shared memory, for instructions that take only global ones.
void check_global(const void* address, const char* instruction, const Site& site);
// Also refuses an address of an output: memory that a kernel writes must not go through the
// read-only cache.
void check_constant(const void* address, const char* instruction, const Site& site);

// Registers a tensor that kernels may access, until `unregister_tensors`. `name` must stay valid.
void register_tensor(const void* begin, size_t bytes, const char* name, bool writable);
void unregister_tensors();

struct Shared {
  Shared();
  ~Shared();
  Shared(const Shared&) = delete;

  void begin(size_t dynamic_bytes);  // begins a block
  bool contains(const void* p) const { return p >= base && p < base + size; }
  uint32_t offset(const void* p) const {  // the value of a shared address on a GPU
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - base);
  }
  // The block's copy of a __shared__ variable; each instantiation of a variable has an `id`.
  void* variable(size_t id, size_t bytes, size_t alignment, const Site& site);
  unsigned char* dynamic = nullptr;

  std::string describe(const void* p) const;  // for a message

  void access(const void* p, size_t bytes, Access access, const Site& site);
  void begin_copy(const Copy& copy);                  // cp.async: no access until the end
  void end_copy(const Copy& copy, const Site& site);  // counts as a write of the waiting thread

 private:
  void inside(const void* p, size_t bytes, const Site& site) const;
  Word& word(size_t offset);

  unsigned char* base;
  size_t size, used = 0, static_bytes = 0, dynamic_bytes = 0;
  std::vector<void*> slots;
  std::vector<std::pair<unsigned char*, unsigned char*>> variables;  // begin, end
  std::vector<Word> static_words, dynamic_words;
};

void begin_races();  // begins a launch: no access to global memory yet

size_t new_variable();  // a new id for a shared variable

}  // namespace simt
