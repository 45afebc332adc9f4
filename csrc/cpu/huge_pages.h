// Asks for pages of 2 MiB under large fresh memory, before the first write: where the system offers
// them on request (`madvise`, the usual setting), 512 page faults become one.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "tensor.h"

namespace fastlm {

inline void use_huge_pages([[maybe_unused]] const TensorView& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t at = uintptr_t(t.dl.data) + t.dl.byte_offset,
                  bytes = uintptr_t(t.numel()) * t.dl.dtype.bits / 8;
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastlm
