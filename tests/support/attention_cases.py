"""The size of lse's terms, for tests of paged_attention."""

import math


def lse_size(lse, keys):
    """The magnitude of the terms of lse = m + log l, where 1 <= l <= keys (+ 1 with a sink)."""
    return (lse.abs().max().item() if lse.numel() else 0.0) + math.log(keys + 1)
