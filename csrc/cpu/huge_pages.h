// Large outputs in huge pages. A fresh tensor is memory that the kernel gives at the first write,
// zeroed, page by page: on a virtual machine a fault of 4 KiB costs 1 us, four times what writing
// the page does. One fault of 2 MiB costs a quarter of its 512 small ones.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "tensor.h"

namespace fastlm {

// False where freed memory stays in the process (fastlm/memory.py): its pages are there, and a
// training step was 5 % slower in huge ones (the L2 is indexed by physical addresses: rows whose
// distance is a power of two then share its sets).
inline bool huge_pages_wanted = true;

// Asks for 2 MiB pages around an output that is about to be written (Linux grants it unless
// transparent_hugepage is `never`). The pages at its ends may hold neighbours on the heap: this is
// a hint and changes no byte. Where it cannot be had, nothing happens.
inline void prefer_huge_pages([[maybe_unused]] const TensorView& output) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  // Below 4 MiB memory mostly comes from the heap and has its pages; the call costs 1 us.
  constexpr uintptr_t LEAST = 4 << 20;
  const uintptr_t bytes = uintptr_t(output.numel()) * (output.dl.dtype.bits / 8);
  if (!huge_pages_wanted || bytes < LEAST || !output.on_cpu()) return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(output.dl.data) + output.dl.byte_offset;
  const uintptr_t first = from / PAGE * PAGE, end = (from + bytes + PAGE - 1) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastlm
