"""Slice the part of a bias that belongs to one sequence."""

from torch import Tensor


def sequence_bias(bias: Tensor | None, b: int, rows: int, keys: int) -> Tensor | None:
    """Return sequence b's part of a bias over (B, H, longest S, longest T)."""
    if bias is None:
        return None
    bias = bias[b : b + 1] if bias.shape[0] > 1 else bias
    bias = bias[:, :, :rows] if bias.shape[2] > 1 else bias
    return bias[..., :keys] if bias.shape[3] > 1 else bias
