// Memory as a checker sees it.
//
// An access by load, store, an atomic, ldmatrix or cp.async must lie inside a tensor that the host
// code named with `know`, or inside the block's shared memory, which is poisoned when the block
// begins and must be written before it is read. Every 4 bytes have a shadow word that says who
// wrote and who read last. Two accesses by two threads one of which writes must be ordered:
//
// - lanes of one warp: by a barrier or __syncwarp (a shuffle, a vote or a matrix instruction orders
//   nothing);
// - warps of one block: by barriers;
// - blocks, in global memory: by atomics on one address, before which the one has written and after
//   which the other reads (that a fence and a barrier stand beside them is not checked).
//
// This finds a race whatever order the threads ran in. Global memory is followed where
// Options::races says so: blocks run one at a time then. What a kernel reads and writes past these
// functions (`p[i]`) is seen by the sanitizers and by the poison alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "simt/block.h"

namespace simt {

constexpr size_t kMostStatic = 48 << 10;
constexpr size_t kMostDynamic = 227 << 10;

enum class Access { read, write, atomic };

struct Stamp {  // who and when; of which of the 4 bytes
  uint32_t block = 0;
  uint16_t thread = 0;
  uint8_t bytes = 0;  // a bit each; 0: nobody
  bool atomic = false;
  uint32_t clock = 0, syncs = 0, epoch = 0;
};

struct Word {  // the shadow of 4 bytes
  Stamp writer, readers[2];
  uint8_t written = 0, in_flight = 0;  // a bit a byte

  void touch(uint8_t bytes, Access access, const void* p, const Site& site);
};

// Refuses an access that is misaligned, out of bounds, of shared memory that nobody has written, or
// not ordered after another thread's; counts it.
void check(const void* address, size_t size, size_t alignment, Access access, const Site& site);

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
  size_t size, used = 0, dynamic_bytes = 0;
  std::vector<void*> slots;
  std::vector<Word> static_words, dynamic_words;
};

void begin_races();  // of a launch: nobody has touched global memory
// The running block's atomic at this address: it sees what blocks did before theirs.
void meet_blocks(const void* address);

size_t new_variable();  // ids of shared variables

}  // namespace simt
