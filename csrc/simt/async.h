// cp.async: asynchronous copies from global to shared memory. Here a copy arrives when the kernel
// waits for it, not before. Until then the destination is poisoned, and touching it is an error.
#pragma once

#include "simt/memory.h"

namespace simt {

// `valid` bytes of the source, then zeros.
void start_copy(const Copy& copy, const Site& site);
void commit_copies();
void wait_copies(int groups_left, const Site& site);

}  // namespace simt
