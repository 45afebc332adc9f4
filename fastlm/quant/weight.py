"""A weight of 4 or 8 bits a value with a float scale (and offset) per group of input features.

``w[n, k] = scales[n, k // group_size] * q[n, k] (+ zeros[n, k // group_size])``. The offset is a float added after
scaling, not an integer zero point: that is what GGUF's Q4_1 and Q4_K hold, and it needs no rounding to represent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.errors import InputError

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class QuantizedWeight:
    """``qdata`` is int8 (N, K) for 8 bits; for 4 bits uint8 (N, K // 2), column 2i in the low nibble and 2i+1 in the
    high one, q = nibble - 8. ``scales`` and ``zeros`` are (N, K // group_size); ``zeros`` None means symmetric."""

    qdata: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        n, k = self.shape = (int(self.shape[0]), int(self.shape[1]))
        if self.bits not in (4, 8):
            raise InputError(f"bits: wanted 4 or 8, came {self.bits}")
        if self.group_size < 1 or k % self.group_size or (self.bits == 4 and k % 2):
            raise InputError(
                f"group_size: wanted a divisor of the {k} input features (even for 4 bits), "
                f"came {self.group_size}"
            )
        dtype, columns = (torch.uint8, k // 2) if self.bits == 4 else (torch.int8, k)
        groups = (n, k // self.group_size)
        self._check("qdata", self.qdata, (n, columns), (dtype,))
        self._check("scales", self.scales, groups, SCALE_DTYPES)
        if self.zeros is not None:
            self._check("zeros", self.zeros, groups, SCALE_DTYPES)

    @staticmethod
    def _check(
        name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            wanted = " or ".join(str(d) for d in dtypes)
            came = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise InputError(f"{name}: wanted {wanted} {shape}, came {came}")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (N, K) weight, computed in float32 and then cast to ``dtype``."""
        if self.bits == 4:
            pairs = torch.stack([self.qdata & 15, self.qdata >> 4], dim=-1)  # (N, K/2, 2)
            q = pairs.reshape(self.shape).to(torch.int8) - 8
        else:
            q = self.qdata
        groups = q.reshape(*self.scales.shape, self.group_size).float()
        w = groups * self.scales.float().unsqueeze(-1)
        if self.zeros is not None:
            w = w + self.zeros.float().unsqueeze(-1)
        return w.reshape(self.shape).to(dtype)
