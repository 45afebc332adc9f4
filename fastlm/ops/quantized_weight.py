"""A weight matrix in int8 or int4 with one scale (and, if asymmetric, one offset) per group of
columns.

The layout is row-major and the same on every machine: a checkpoint is used in place, and no
second copy is made. Rejected: a layout repacked per instruction set (the CPU kernels transpose 16
rows at a time in registers, which costs a few percent of one product and nothing in memory).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.errors import InputError

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 8 columns of int4 fill a 32-bit lane: the kernels need each lane to be within one group.
GROUP_STEP = 8
ANY_K = 1 << 62  # for check_group_size where there is no weight yet


def check_group_size(group_size: int, k: int) -> int:
    """Return the group size, with -1 (one group per row) resolved."""
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise InputError(f"group_size: expected an int, got {group_size!r}")
    if group_size == -1:
        return k
    if group_size <= 0 or (group_size < k and group_size % GROUP_STEP):
        raise InputError(
            f"group_size: expected -1 (one group a row), a multiple of {GROUP_STEP}"
            f"{f', or at least K = {k}' if k < ANY_K else ''}, got {group_size}"
        )
    return group_size


@dataclass(eq=False, repr=False)
class QuantizedWeight:
    """``w[n, k] = scales[n, k // group_size] * q[n, k] (+ zeros[n, k // group_size])``, shape
    (N, K).

    The last group of a row is short if `group_size` does not divide K.

    This is a value, neither a tensor nor a module: as an attribute of a module it is in no
    ``state_dict`` and does not follow ``.to()``. `fastlm.quant.QuantizedLinear` holds one in
    buffers.

    Attributes:
        qdata: bits 8: int8 (N, K). bits 4: uint8 (N, ceil(K / 2)), column 2i in the low nibble,
            2i + 1 in the high one, q = nibble - 8 (the spare nibble of an odd K is not read).
        scales: (N, ceil(K / group_size)), float32, bfloat16 or float16; any sign.
        zeros: offsets like `scales`, in any of these dtypes, or None: symmetric.
        bits: 4 or 8.
        group_size: columns per scale, a multiple of 8 or at least K.
        shape: (N, K).

    Raises:
        InputError: a tensor that does not fit the others.
    """

    qdata: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        self.shape = (int(self.shape[0]), int(self.shape[1]))
        n, k = self.shape
        if n < 0 or k < 1:
            raise InputError(f"shape: expected (N, K), K >= 1, got {self.shape}")
        if self.bits not in (4, 8):
            raise InputError(f"bits: expected 4 or 8, got {self.bits}")
        self.group_size = check_group_size(self.group_size, k)
        expected = (torch.int8, (n, k)) if self.bits == 8 else (torch.uint8, (n, (k + 1) // 2))
        if (self.qdata.dtype, tuple(self.qdata.shape)) != expected:
            raise InputError(
                f"qdata: expected {expected[0]} {expected[1]} for {self.bits} bits of shape "
                f"{self.shape},"
                f" got {self.qdata.dtype} {tuple(self.qdata.shape)}"
            )
        groups = (n, -(-k // self.group_size))
        for name, t in (("scales", self.scales), ("zeros", self.zeros)):
            if t is None:
                continue
            if t.dtype not in SCALE_DTYPES or tuple(t.shape) != groups:
                raise InputError(
                    f"{name}: expected float32, bfloat16 or float16 {groups}"
                    f" for groups of {self.group_size}, got {t.dtype} {tuple(t.shape)}"
                )
            if t.device != self.qdata.device:
                raise InputError(
                    f"{name}: expected device {self.qdata.device} as qdata, got {t.device}"
                )

    def __repr__(self) -> str:
        zeros = "" if self.zeros is None else ", zeros"
        return (
            f"QuantizedWeight({self.shape[0]}, {self.shape[1]}, int{self.bits},"
            f" group_size={self.group_size}, scales={self.scales.dtype}{zeros},"
            f" device={str(self.device)!r})"
        )

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(t.nbytes for t in (self.qdata, self.scales, self.zeros) if t is not None)

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (N, K) in `dtype`; products and sums in float32 (float64 for float64)."""
        return torch.ops.fastlm.dequantize(
            self.qdata,
            self.scales,
            self.zeros,
            self.bits,
            self.group_size,
            self.shape[1],
            dtype,
        )

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """Return the same weight on another device, with unchanged dtypes."""
        return QuantizedWeight(
            self.qdata.to(device),
            self.scales.to(device),
            None if self.zeros is None else self.zeros.to(device),
            self.bits,
            self.group_size,
            self.shape,
        )


def pack_rows(q: Tensor, bits: int) -> Tensor:
    """Pack codes: the inverse of `fastlm.reference.unpack_rows`. A spare nibble is 8 (q = 0)."""
    if bits == 8:
        return q.to(torch.int8).contiguous()
    nibbles = (q + 8).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=8)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous()
