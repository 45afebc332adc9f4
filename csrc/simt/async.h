// cp.async: copies from global to shared memory behind the kernel's back. Here they arrive when
// they are waited for, not before; until then the destination is poison, and touching it is an
// error.
#pragma once

#include "simt/memory.h"

namespace simt {

// `valid` bytes of the source, then zeros.
void start_copy(const Copy& copy, const Site& site);
void commit_copies();
void wait_copies(int groups_left, const Site& site);

}  // namespace simt
