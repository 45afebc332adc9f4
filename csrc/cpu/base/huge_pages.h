// Huge pages for large outputs. Linux provides the zeroed memory of a new tensor page by page, at
// the first write. On a virtual machine the fault of a 4 KiB page takes 1 us, four times as long as
// writing the page. One fault of 2 MiB costs a quarter of 512 small ones.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "tensor.h"

namespace fastlm {

// False where the process keeps freed memory (fastlm/memory.py). Its pages are mapped already, and
// a training step was 5 % slower in huge pages: the L2 is indexed by physical addresses, so rows at
// a distance of a power of two share its sets.
inline bool use_huge_pages = true;

// Requests 2 MiB pages for an output that is about to be written (Linux grants them unless
// transparent_hugepage is `never`). The pages at its ends may hold neighbours on the heap: this is
// a hint and changes no byte. An error is ignored.
inline void prefer_huge_pages([[maybe_unused]] const TensorView& output) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  // Below 4 MiB memory mostly comes from the heap and is mapped already; the call costs 1 us.
  constexpr uintptr_t MIN_BYTES = 4 << 20;
  const uintptr_t bytes = uintptr_t(output.numel()) * (output.dl.dtype.bits / 8);
  if (!use_huge_pages || bytes < MIN_BYTES || !output.on_cpu()) return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(output.dl.data) + output.dl.byte_offset;
  const uintptr_t first = from / PAGE * PAGE, end = (from + bytes + PAGE - 1) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastlm
