// Memory as a checker sees it.
//
// Global: the tensors that the host code named with `know`; an access by load, store, an atomic or
// cp.async must lie inside one of them. Shared: the block's variables, poisoned when it begins,
// with a shadow word for every 4 bytes that says who wrote and who read last. Two accesses by two
// threads one of which writes must be ordered: by a barrier between the warps, by a barrier or
// __syncwarp between lanes of one warp (a shuffle, a vote or a matrix instruction orders nothing).
// This finds a race whatever order the threads ran in; what the kernel reads and writes past these
// functions
// (`p[i]`) is seen by the sanitizers and by the poison alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "simt/block.h"

namespace simt {

constexpr size_t kMostStatic = 48 << 10;
constexpr size_t kMostDynamic = 227 << 10;

enum class Access { read, write, atomic };

// Refuses an access that is misaligned, out of bounds, of shared memory that nobody has written, or
// not ordered after another thread's; counts it.
void check(const void* address, size_t size, size_t alignment, Access access, const Site& site);

// The tensors that kernels may touch, until `forget`. `name` must stay.
void know(const void* begin, size_t bytes, const char* name, bool writable);
void forget();
size_t known_bytes(const void* begin);  // 0: not a tensor's first byte

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

  void access(const void* p, size_t bytes, Access access, const Site& site);
  void begin_copy(const Copy& copy);                  // cp.async: no one may touch it
  void end_copy(const Copy& copy, const Site& site);  // it is written by who waited

 private:
  struct Stamp {  // who and when; of which of the 4 bytes
    uint16_t thread = 0;
    uint8_t bytes = 0;  // a bit each; 0: nobody
    bool atomic = false;
    uint32_t clock = 0, syncs = 0;
  };
  struct Word {
    Stamp writer, readers[2];
    uint8_t written = 0, in_flight = 0;  // a bit a byte
  };
  static bool ordered(const Stamp& before);
  void refuse_race(const Stamp& before, bool wrote, const void* p, const Site& site) const;
  void inside(const void* p, size_t bytes, const Site& site) const;
  void touch(Word& word, uint8_t bytes, Access access, const void* p, const Site& site);

  unsigned char* base;
  size_t size, used = 0, dynamic_bytes = 0;
  std::vector<void*> slots;
  std::vector<Word> words;
};

size_t new_variable();  // ids of shared variables

}  // namespace simt
