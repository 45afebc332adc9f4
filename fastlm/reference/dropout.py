"""The random numbers of dropout."""

import torch
from torch import Tensor


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Run Philox4x32-10 (Salmon et al. 2011): four 32-bit words per counter, in int64 tensors."""
    c, k0, k1 = list(counter), seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        high_a, high_b = (a >> 32) & 0xFFFFFFFF, (b >> 32) & 0xFFFFFFFF
        c = [high_b ^ c[1] ^ k0, b & 0xFFFFFFFF, high_a ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def dropout_factor(
    seed: Tensor, p: float, batch: Tensor, heads: int, rows: Tensor, keys: int
) -> Tensor:
    """Return 0 or 1 / (1 - p) for each score.

    It depends only on batch, head, row, key and seed, so that every backend and block size draws
    the same.

    Key j uses word (j // 16) % 4 of counter ((j // 64) * 16 + j % 16, row, head, batch): 16 lanes
    of a vector are 16 neighbouring keys. The key is dropped if the word is below p * 2^32.
    """
    groups = (keys + 63) // 64
    device = seed.device
    x = torch.arange(groups * 16, device=device)
    head = torch.arange(heads, device=device)[:, None, None]
    counter = torch.broadcast_tensors(x, rows[:, None], head, batch[:, None, None, None])
    words = torch.stack([w.unflatten(-1, (groups, 16)) for w in philox(counter, seed)], -2)
    keep = words.flatten(-3)[..., :keys] >= int(p * 2**32)
    return keep * (1 / (1 - p) if p < 1 else 0.0)
