"""Memory of a step: recompute values instead of keeping them, and keep freed memory.

Both exist because a step uses large tensors that live for milliseconds. On the machine of
docs/log.md (42 M parameters, 4096 tokens), a step spent 12 % of its time on 150,000 fresh pages
from the kernel, until the process kept the memory that it freed.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastlm.backend import cpu_extension, unavailable_reason
from fastlm.errors import InputError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's <malloc.h>
_MAX_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
_keeps_all = False


def keep_freed_memory(limit: int | None = None) -> bool:
    """Let the process keep the memory that it frees, for the tensors of the next step.

    By default, glibc returns large blocks to the kernel at once and gets them back page by page,
    each zeroed. This call changes that (``mallopt``), for the whole process until it ends.

    Args:
        limit: None: keep everything, so that the size of the process stays at its peak.
            `fastlm.train` calls it so; call it once in a training script of your own. It does not
            suit a process that needs much memory once and then little for a long time. Else: keep
            at most so many bytes at the end of each heap, of blocks up to 32 MiB, as
            `fastlm.Engine` does on a CPU. A call without a limit stays in effect.

    Return whether it worked: False without glibc (macOS, musl), where nothing changes. InputError:
    a limit that is no C int.
    """
    if limit is not None and not 0 <= limit < 1 << 31:
        raise InputError(f"limit: expected 0 to {(1 << 31) - 1:,} bytes, got {limit:,}")
    global _keeps_all
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    if limit is not None:
        if _keeps_all:
            return True
        settings = {_M_MMAP_THRESHOLD: _MAX_MMAP_THRESHOLD, _M_TRIM_THRESHOLD: limit}
        return all([bool(mallopt(name, value)) for name, value in settings.items()])
    _keeps_all = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
    if _keeps_all and unavailable_reason("cpu") is None:
        cpu_extension.set_huge_pages(False)  # csrc/cpu/base/huge_pages.h
    return _keeps_all


class recompute(saved_tensors_hooks):
    """A context in which operations save a placeholder for `value` instead of its memory.

    The first backward of these operations calls `function`, which recomputes `value`, bit for bit,
    from tensors that are kept anyway. The last backward releases it. Use it for values that cost
    less to compute than to keep: a norm before its projections, a GLU's product before down_proj.
    Rejected: ``torch.utils.checkpoint``, which would also rerun the matrix products between them.

    Inside other hooks (``torch.utils.checkpoint``, ``save_on_cpu``) it does nothing, because these
    hooks would not see the tensors that are saved in here, and all of them would stay in memory.
    """

    @classmethod
    def can_enter(cls) -> bool:
        """Return whether no hooks are active now, or only those of this class."""
        autograd = torch._C._autograd  # type: ignore[attr-defined]
        top = autograd._top_saved_tensors_default_hooks(True)
        return top is None or getattr(top[0], "__module__", None) == __name__

    def __init__(self, value: Tensor, function: Callable[[], Tensor]):
        address, size = value.data_ptr(), value.numel()
        recomputed: Tensor | None = None
        num_saved = num_pending = 0

        def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
            nonlocal num_saved, num_pending
            if saved.data_ptr() != address or saved.numel() != size:
                return saved
            num_saved, num_pending = num_saved + 1, num_pending + 1
            return saved.shape, saved.stride()

        def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
            nonlocal recomputed, num_pending
            if isinstance(packed, Tensor):
                return packed
            out = recomputed if recomputed is not None else function()
            num_pending -= 1
            recomputed = out if num_pending else None
            num_pending = num_pending or num_saved  # for a second backward of a retained graph
            return out.as_strided(*packed)

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
