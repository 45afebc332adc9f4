"""rms_norm by torch. `calls` shows that it ran."""

import torch

calls = []


def rms_norm_forward(x, residual, weight, eps, offset):
    calls.append(x.shape)
    h = x if residual is None else x + residual
    rstd = torch.rsqrt(h.float().square().mean(-1) + eps)
    y = (h.float() * rstd[..., None] * (offset + weight.float())).to(x.dtype)
    return y, x.new_empty(0) if residual is None else h, rstd
