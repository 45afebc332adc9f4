"""rope by csrc/cpu/rope.h. This file allocates the results, in the memory order of q and k."""

import torch
from torch import Tensor

from fastlm.backend import cpu_extension as _cpu
from fastlm.memory_order import dense


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool):
    if cos.dtype != torch.float32 and cos.dtype != q.dtype:
        cos, sin = cos.float(), sin.float()
    q, k = dense(q), dense(k)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _cpu.rope(q, k, dense(cos), dense(sin), interleaved, inverse, q_out, k_out)
    return q_out, k_out
