// The slots of a decode step's tokens in a paged cache.
#pragma once

#include "cuda/launch.h"

namespace fastlm {

struct TokenSlots {
  const int* positions;  // (B, S)
  const int* table;      // (B, table_pages) page numbers, row stride table_row
  int64_t table_row;
  int tokens, pages, page_size, table_pages;  // tokens: per sequence

  struct TokenSlot {
    int b, s;        // sequence, token of it
    int position;    // as passed
    int page, slot;  // page -1: the token has no slot
  };
  // Returns the slot of token i of B S.
  DEVICE TokenSlot slot_of(int i) const {
    TokenSlot to{i / tokens, i % tokens, load(positions + i), -1, 0};
    const int entry = to.position / page_size;
    if (to.position < 0 || entry >= table_pages) return to;
    const int page = load(table + to.b * table_row + entry);
    if (page >= 0 && page < pages) to.page = page, to.slot = to.position % page_size;
    return to;
  }
};

// ---- host

// Returns the slots of `sequences` of `tokens` each, in caches (pages, page_size, ..).
inline TokenSlots token_slots(const TensorView& positions, const TensorView& block_table,
                              int64_t sequences, int64_t tokens, const TensorView& k_cache,
                              const TensorView& v_cache) {
  check_contiguous("positions", positions);
  check_size("positions", "entries, one a token", sequences * tokens, positions.numel());
  check_size("block_table", "rows", sequences, block_table.size(0));
  if (block_table.size(1) > 1)
    check_size("block_table", "entries side by side, stride", 1, block_table.stride(1));
  check_size("v_cache", "pages as k_cache", k_cache.size(0), v_cache.size(0));
  check_size("v_cache", "page size of k_cache", k_cache.size(1), v_cache.size(1));
  if (k_cache.size(1) == 0)
    throw std::invalid_argument("k_cache: expected pages with slots, got 0");
  return {input<int>(positions, "positions"),
          input<int>(block_table, "block_table"),
          block_table.stride(0),
          static_cast<int>(tokens),
          static_cast<int>(k_cache.size(0)),
          static_cast<int>(k_cache.size(1)),
          static_cast<int>(block_table.size(1))};
}

}  // namespace fastlm
