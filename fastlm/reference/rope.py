"""The definition of `rope`."""

import torch
from torch import Tensor

from fastlm.reference.precision import widen


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute y = x * cos + rotate(x) * sin on the first R = cos.shape[-1] of D elements.

    x is q and k. `inverse` is the transposed map x * cos + rotate^T(x * sin), where
    rotate^T = -rotate.

    q (B, H, S, D), k (B, Hkv, S, D), cos and sin (S, R), (1, S, R) or (B, S, R).
    """

    def rotate(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def apply(x: Tensor) -> Tensor:
        wide, y = widen(x), torch.empty_like(x)
        c, s = (t.to(wide.dtype).unsqueeze(-3) for t in (cos, sin))
        part, rest = wide.tensor_split((cos.shape[-1],), -1)
        turned = part * c - rotate(part * s) if inverse else part * c + rotate(part) * s
        return y.copy_(torch.cat((turned, rest), -1))

    return apply(q), apply(k)
