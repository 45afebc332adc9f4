"""Cases of the Triton gate for cross_entropy; see tests/gates/triton_gate/__main__.py."""

import torch

from fastlm.kernels import cross_entropy
from triton_gate import FLOATS, HALVES, LOADS, Case, meta


def _case(
    rows: int,
    classes: int,
    *,
    smooth: bool = False,
    weighted: bool = False,
    softcap: float | None = None,
    vectors: bool = True,
    dtypes: tuple = (torch.bfloat16,),
) -> Case:
    def run(dtype: torch.dtype) -> None:
        logits, target = meta(rows, classes, dtype=dtype), meta(rows, dtype=torch.int64)
        weight = meta(classes) if weighted else None
        on_p, shift, log_sum = (meta(rows) for _ in range(3))
        on_all = on_p if smooth else None
        options = (-100, softcap, 1.0)
        cross_entropy.cross_entropy_forward(logits, target, weight, smooth, *options)
        cross_entropy.cross_entropy_backward(
            on_p, on_p, on_all, logits, target, weight, shift, log_sum, *options
        )

    flags = {"smooth": smooth, "weighted": weighted, "softcap": softcap}
    names = [name for name, value in flags.items() if value]
    expected = {"_forward": ("LDG.E.128",), "_backward": LOADS} if vectors else {}
    return Case(f"{rows} x {classes} {' '.join(names)}".strip(), run, expected, dtypes)


# The second case has a softcap and weights. With few rows each row is split. An odd number of
# classes cannot be loaded by 128 bits. Few classes result in a small block.
CASES = [
    _case(4096, 32768, dtypes=FLOATS),
    _case(4096, 128256, smooth=True, weighted=True, softcap=30.0, dtypes=HALVES),
    _case(4096, 128256, smooth=True),
    _case(8, 262144, softcap=30.0),
    _case(8, 262144, smooth=True, weighted=True),
    _case(64, 50257, vectors=False),
    _case(64, 100, vectors=False),
]
