// Memory as a checker sees it.
//
// An access by load, store, an atomic, ldmatrix or cp.async must lie inside a tensor that the host
// code named with `know`, or inside the block's shared memory, which is poisoned when the block
// begins and must be written before it is read. Every 4 bytes have a shadow word that says who
// wrote and read them. Two accesses by two threads one of which writes must be ordered (order.h).
// This finds a race whatever order the threads ran in. Global memory is followed where
// Options::races says so: blocks run one at a time then. What a kernel reads and writes past these
// functions (`p[i]`) is seen by the sanitizers and by the poison alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "simt/block.h"

namespace simt {

constexpr size_t kMostStatic = 48 << 10;
constexpr size_t kMostDynamic = 227 << 10;    // static ones count towards both
constexpr size_t kDynamicUnasked = 32 << 10;  // beyond it cuda/launch.h asks for kMostDynamic

enum class Access : uint16_t { read, write, atomic };

// Who did what and when, to which of the 4 bytes (a bit each; none: nobody).
using Stamp = Moment;

// The shadow of 4 bytes. It has room for who wrote each half, and two readers: of any number of
// readers (or of atomics) two of different warps, or of different lanes, are enough, since a later
// write that is ordered after both is ordered after all. Of many readers of smaller pieces some are
// forgotten.
struct Word {
  Stamp stamps[4];
  uint8_t written = 0, in_flight = 0;  // a bit a byte

  void touch(uint8_t bytes, Access access, const void* p, const Site& site);

 private:
  Stamp& room(const Stamp& wanted);
};

// Refuses an access that is misaligned, out of bounds, of shared memory that nobody has written, or
// not ordered after another thread's; counts it.
void check(const void* address, size_t size, size_t alignment, Access access, const Site& site);

// Refuses an address of shared memory, for instructions that take global ones alone.
void check_global(const void* address, const char* instruction, const Site& site);
// And of an output: what a kernel may write does not go through the read-only cache.
void check_constant(const void* address, const char* instruction, const Site& site);

// The tensors that kernels may touch, until `forget`. `name` must stay.
void know(const void* begin, size_t bytes, const char* name, bool writable);
void forget();

struct Shared {
  Shared();
  ~Shared();
  Shared(const Shared&) = delete;

  void begin(size_t dynamic_bytes);  // of a block
  bool contains(const void* p) const { return p >= base && p < base + size; }
  uint32_t offset(const void* p) const {  // what a shared address is on a GPU
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - base);
  }
  // The block's copy of a __shared__ variable; `id` is of the variable in its instantiation.
  void* variable(size_t id, size_t bytes, size_t alignment, const Site& site);
  unsigned char* dynamic = nullptr;

  std::string place(const void* p) const;  // for a message

  void access(const void* p, size_t bytes, Access access, const Site& site);
  void begin_copy(const Copy& copy);                  // cp.async: no one may touch it
  void end_copy(const Copy& copy, const Site& site);  // it is written by who waited

 private:
  void inside(const void* p, size_t bytes, const Site& site) const;
  Word& word(size_t offset);

  unsigned char* base;
  size_t size, used = 0, static_bytes = 0, dynamic_bytes = 0;
  std::vector<void*> slots;
  std::vector<std::pair<unsigned char*, unsigned char*>> variables;  // begin, end
  std::vector<Word> static_words, dynamic_words;
};

void begin_races();  // of a launch: nobody has touched global memory

size_t new_variable();  // ids of shared variables

}  // namespace simt
