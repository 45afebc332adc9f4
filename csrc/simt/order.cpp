#include "simt/order.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "simt/block.h"
#include "simt/tsan.h"

namespace simt {
namespace {

std::unordered_map<const void*, Views> views_by_address;  // blocks run one at a time

// Whether `before` comes before the current position of `thread` of its block, by these clocks.
bool within_block(const Moment& before, int thread, const std::vector<uint32_t>& clocks,
                  const uint32_t* syncs_before) {
  const int other_warp = before.thread / 32, own_index = thread / 32;
  if (other_warp != own_index) return clocks[other_warp] >= before.clock;
  return before.syncs < syncs_before[before.thread % 32] || before.clock < clocks[own_index];
}

bool covers(const View& view, const Moment& before) {
  if (before.block != view.at.block) return false;
  if (before.thread == view.at.thread) return before.fences < view.at.fences;
  return within_block(before, view.at.thread, view.clocks, view.syncs_before);
}

void add(Views& views, const std::shared_ptr<const View>& view) {
  auto& latest = views[{view->at.block, view->at.thread}];
  if (!latest || latest->at.fences < view->at.fences) latest = view;
}

}  // namespace

Moment now() {
  const Warp& warp = *self->warp;
  Moment m;
  m.block = self->block->number;
  m.clock = warp.clocks[self->number / 32];
  m.syncs = warp.syncs_before[self->lane][self->lane];
  m.fences = self->fences;
  m.thread = self->number;
  return m;
}

bool ordered(const Moment& before) {
  const Block& block = *self->block;
  if (before.block == block.number)
    return before.thread == self->number || within_block(before, self->number, self->warp->clocks,
                                                         self->warp->syncs_before[self->lane]);
  return std::any_of(block.acquired.begin(), block.acquired.end(),
                     [&](const auto& a) { return covers(*a.first, before) && ordered(a.second); });
}

// Orders everything so far of every warp with a thread among these before everything that they do
// from now on.
void join_at_barrier(const std::vector<Thread*>& threads) {
  std::vector<Warp>& warps = threads[0]->block->warps;
  std::vector<uint32_t> merged(warps.size(), 0);
  for (Thread* t : threads)
    for (size_t w = 0; w < merged.size(); ++w) merged[w] = std::max(merged[w], t->warp->clocks[w]);
  for (Thread* t : threads) {
    auto& clocks = t->warp->clocks;
    const size_t own_index = t->warp - warps.data();
    if (clocks[own_index] > merged[own_index]) continue;  // done for another lane of this warp
    clocks = merged;
    ++clocks[own_index];
  }
}

void join_at_syncwarp(uint32_t (&syncs_before)[32][32], uint32_t mask) {
  uint32_t merged[32] = {};
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    ++syncs_before[lane][lane];
    for (int l = 0; l < 32; ++l) merged[l] = std::max(merged[l], syncs_before[lane][l]);
  }
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1)
    std::memcpy(syncs_before[__builtin_ctz(lanes)], merged, sizeof merged);
}

void fence() {
  if (!options().races) return;
  const Quiet quiet;
  Thread& t = *self;
  Block& block = *t.block;
  for (const auto& [who, view] : t.read)
    if (view->at.block != block.number) block.acquired.push_back({view, now()});
  t.read.clear();
  if (!++t.fences) fail("more fences of a thread than are followed: 65535", t.site);
  for (const auto& [view, acquired] : block.acquired)
    if (ordered(acquired)) add(t.released, view);
  View own_index{now(), t.warp->clocks, {}};
  std::memcpy(own_index.syncs_before, t.warp->syncs_before[t.lane], sizeof own_index.syncs_before);
  add(t.released, std::make_shared<const View>(own_index));
}

void exchange_views(const void* address) {
  if (!options().races) return;
  const Quiet quiet;
  Views& published = views_by_address[address];
  for (const auto& [who, view] : published) add(self->read, view);
  for (const auto& [who, view] : self->released) add(published, view);
}

void begin_order() { views_by_address.clear(); }

}  // namespace simt
