// Counts the cost of a kernel's memory instructions from their addresses.
//
// Lanes do not run in step here, so the k-th access of each lane of a warp at one site of the
// source counts as one instruction. Global: the 32-byte sectors that it accesses, and the minimum
// that could hold its bytes. Shared: the passes over the 32 banks of 4 bytes (8-byte accesses take
// half warps, 16-byte accesses quarters), and the minimum.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "simt/memory.h"

namespace simt {

struct Count {
  int64_t instructions = 0, transactions = 0, min_transactions = 0;  // sectors or passes
};

struct Counts {
  struct Note {
    const void* address;
    uint32_t size;
    Access access;
    bool shared;
    Site site;
  };
  std::vector<std::vector<Note>> notes;  // per thread

  void begin(int threads);
  void note(const void* address, size_t size, Access access, bool shared, const Site& site);
  void end(const char* kernel, const Block& block);
};

// By "kernel file:line read|write|atomic global|shared"; since the last reset.
std::map<std::string, Count> report();
void reset_report();

}  // namespace simt
