"""Count the peak memory of tensors, also of tensors without memory (meta)."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TensorPeak(TorchDispatchMode):
    """The peak size in bytes of all tensors created here that are alive at the same time."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak_bytes = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    self.peak_bytes = max(self.peak_bytes, self.bytes)
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key, size):
        self.alive.discard(key)
        self.bytes -= size
