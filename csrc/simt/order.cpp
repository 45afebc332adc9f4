#include "simt/order.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "simt/block.h"
#include "simt/tsan.h"

namespace simt {
namespace {

std::unordered_map<const void*, Views> meeting_places;  // blocks run one at a time

// Whether `before` comes before what `thread` of its block does now, by these clocks.
bool within_block(const Moment& before, int thread, const std::vector<uint32_t>& clocks,
                  const uint32_t* seen) {
  const int its_warp = before.thread / 32, own = thread / 32;
  if (its_warp != own) return clocks[its_warp] >= before.clock;
  return before.syncs < seen[before.thread % 32] || before.clock < clocks[own];
}

bool covers(const View& view, const Moment& before) {
  if (before.block != view.at.block) return false;
  if (before.thread == view.at.thread) return before.fences < view.at.fences;
  return within_block(before, view.at.thread, view.clocks, view.seen);
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
  m.syncs = warp.seen[self->lane][self->lane];
  m.fences = self->fences;
  m.thread = self->number;
  return m;
}

bool ordered(const Moment& before) {
  const Block& block = *self->block;
  if (before.block == block.number)
    return before.thread == self->number ||
           within_block(before, self->number, self->warp->clocks, self->warp->seen[self->lane]);
  return std::any_of(block.acquired.begin(), block.acquired.end(),
                     [&](const auto& a) { return covers(*a.first, before) && ordered(a.second); });
}

// Whatever every warp with a thread among these did so far comes before what they do from now on.
void join_at_barrier(const std::vector<Thread*>& threads) {
  std::vector<Warp>& warps = threads[0]->block->warps;
  std::vector<uint32_t> joined(warps.size(), 0);
  for (Thread* t : threads)
    for (size_t w = 0; w < joined.size(); ++w) joined[w] = std::max(joined[w], t->warp->clocks[w]);
  for (Thread* t : threads) {
    auto& clocks = t->warp->clocks;
    const size_t own = t->warp - warps.data();
    if (clocks[own] > joined[own]) continue;  // done for another lane of this warp
    clocks = joined;
    ++clocks[own];
  }
}

void join_at_syncwarp(uint32_t (&seen)[32][32], uint32_t mask) {
  uint32_t joined[32] = {};
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    ++seen[lane][lane];
    for (int l = 0; l < 32; ++l) joined[l] = std::max(joined[l], seen[lane][l]);
  }
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1)
    std::memcpy(seen[__builtin_ctz(lanes)], joined, sizeof joined);
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
  View own{now(), t.warp->clocks, {}};
  std::memcpy(own.seen, t.warp->seen[t.lane], sizeof own.seen);
  add(t.released, std::make_shared<const View>(own));
}

void meet_blocks(const void* address) {
  if (!options().races) return;
  const Quiet quiet;
  Views& place = meeting_places[address];
  for (const auto& [who, view] : place) add(self->read, view);
  for (const auto& [who, view] : self->released) add(place, view);
}

void begin_order() { meeting_places.clear(); }

}  // namespace simt
