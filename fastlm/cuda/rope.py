"""rope through csrc/cuda/rope.cu."""

import torch
from torch import Tensor

from fastlm.cuda import extension, multiprocessors, stream

_HEADS = 4  # that share a read of the tables, where there are enough positions per multiprocessor
_POSITIONS = 16  # per multiprocessor, from which on there are enough


def _dense(t: Tensor) -> Tensor:
    """Return t with contiguous elements in the last dimension."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k = _dense(q), _dense(k)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    if cos.dtype != torch.float32 and cos.dtype != q.dtype:
        cos, sin = cos.float(), sin.float()
    many = q.shape[0] * q.shape[2] >= _POSITIONS * multiprocessors(q.device)
    extension().rope(
        q, k, _dense(cos), _dense(sin), interleaved, inverse, _HEADS if many else 1, q_out, k_out,
        stream(q),
    )  # fmt: skip
    return q_out, k_out
