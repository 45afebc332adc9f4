"""Memory of a training step: values that need not be kept, freed memory that need not be returned.

Both exist because a step uses large tensors that live for milliseconds. On the machine of
docs/log.md (42 M parameters, 4096 tokens), a step spent 12 % of its time asking the kernel for
150,000 fresh pages, until the process kept the memory it freed.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastlm.backend import cpu_extension, unavailable_reason

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Let the process keep the memory it frees, for the tensors of the next step.

    glibc returns large blocks to the kernel at once and gets them back page by page, each zeroed.
    This turns both off (``mallopt``: no mmap for blocks, no trimming), for the whole process and
    until it ends: its size stays at its peak. `fastlm.train` calls it; call it once in a training
    script of your own. It does not suit a process that needs much memory once and then little for
    a long time.

    Returns whether it worked: False without glibc (macOS, musl), where nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
    if kept and unavailable_reason("cpu") is None:
        cpu_extension.want_huge_pages(False)  # csrc/cpu/base/huge_pages.h
    return kept


class recompute(saved_tensors_hooks):
    """Context: operations inside save a note of `value` for their backward instead of its memory.

    The first backward among them calls `make`, which returns `value` again, bit for bit, from
    tensors that are kept anyway. The last one releases it. Use it for values that cost less to
    compute than to keep: a norm before its projections, a GLU's product before down_proj. Rejected:
    ``torch.utils.checkpoint``, which would also rerun the matrix products between them.

    Inside other hooks (``torch.utils.checkpoint``, ``save_on_cpu``) it does nothing: they would see
    none of the tensors saved in here, which would all stay in memory.
    """

    @classmethod
    def can_enter(cls) -> bool:
        """Whether no hooks are active now, or only those of this class."""
        autograd = torch._C._autograd  # type: ignore[attr-defined]
        top = autograd._top_saved_tensors_default_hooks(True)
        return top is None or getattr(top[0], "__module__", None) == __name__

    def __init__(self, value: Tensor, make: Callable[[], Tensor]):
        where, size = value.data_ptr(), value.numel()
        made: Tensor | None = None
        notes = left = 0

        def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
            nonlocal notes, left
            if saved.data_ptr() != where or saved.numel() != size:
                return saved
            notes, left = notes + 1, left + 1
            return saved.shape, saved.stride()

        def unpack(note: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
            nonlocal made, left
            if isinstance(note, Tensor):
                return note
            out = made if made is not None else make()
            left -= 1
            made = out if left else None
            left = left or notes  # for a second backward through a retained graph
            return out.as_strided(*note)

        super().__init__(pack, unpack)
        self.entered = False

    def __enter__(self) -> None:
        if self.can_enter():
            super().__enter__()
            self.entered = True

    def __exit__(self, *args: object) -> None:
        if self.entered:
            super().__exit__(*args)
            self.entered = False
