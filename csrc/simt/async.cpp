#include "simt/async.h"

#include "simt/tsan.h"

namespace simt {

void start_copy(const Copy& copy, const Site& site) {
  const Quiet quiet;
  if (copy.valid > copy.bytes) fail("cp.async: more valid bytes than it copies", site);
  Shared& shared = *self->block->shared;
  if (!shared.contains(copy.to)) fail("cp.async: the destination is not in shared memory", site);
  check_global(copy.from, "cp.async from", site);
  if (reinterpret_cast<uintptr_t>(copy.from) % copy.bytes)
    fail("cp.async: misaligned source", site);
  if (copy.valid) check(copy.from, copy.valid, 1, Access::read, site);
  check(copy.to, copy.bytes, copy.bytes, Access::write, site);
  shared.begin_copy(copy);
  self->open.push_back(copy);
}

void commit_copies() {
  const Quiet quiet;
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

void wait_copies(int groups_left, const Site& site) {
  const Quiet quiet;
  while (static_cast<int>(self->groups.size()) > groups_left) {
    for (const Copy& copy : self->groups.front()) self->block->shared->end_copy(copy, site);
    self->groups.pop_front();
  }
}

}  // namespace simt
