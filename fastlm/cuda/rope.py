"""rope by csrc/cuda/rope.cu."""

import torch
from torch import Tensor

from fastlm.cuda import extension, multiprocessors, stream
from fastlm.memory_order import dense

_HEADS = 4  # heads that share a read of the tables, where there are enough positions
_POSITIONS = 16  # enough positions per multiprocessor


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k = dense(q), dense(k)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    if cos.dtype != torch.float32 and cos.dtype != q.dtype:
        cos, sin = cos.float(), sin.float()
    share = q.shape[0] * q.shape[2] >= _POSITIONS * multiprocessors(q.device)
    extension().rope(
        q, k, dense(cos), dense(sin), interleaved, inverse, _HEADS if share else 1, q_out, k_out,
        stream(q),
    )  # fmt: skip
    return q_out, k_out
