"""The part of a bias that belongs to one sequence."""

from torch import Tensor


def bias_of(bias: Tensor | None, b: int, rows: int, keys: int) -> Tensor | None:
    """The part of a bias over (B, H, longest S, longest T) that belongs to sequence b."""
    if bias is None:
        return None
    bias = bias[b : b + 1] if bias.shape[0] > 1 else bias
    bias = bias[:, :, :rows] if bias.shape[2] > 1 else bias
    return bias[..., :keys] if bias.shape[3] > 1 else bias
