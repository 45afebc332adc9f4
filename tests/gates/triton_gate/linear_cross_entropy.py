"""Cases of the Triton gate for linear_cross_entropy; see tests/gates/triton_gate/__main__.py.

The kernels are cross_entropy's with a bias, float32 logits and a 16-bit gradient. The host
functions run on tensors without memory: this shows that none of them waits for a GPU.
"""

import torch

from fastlm.kernels import linear_cross_entropy
from triton_gate import LOADS, Case, meta


def _case(rows: int, *, bias: bool, every_option: bool, dtypes: tuple) -> Case:
    def run(dtype: torch.dtype) -> None:
        width, classes = 1024, 32000
        x, w = meta(rows, width, dtype=dtype), meta(classes, width, dtype=dtype)
        b, target = meta(classes, dtype=dtype) if bias else None, meta(rows, dtype=torch.int64)
        weight, on_all = (meta(classes), meta(rows)) if every_option else (None, None)
        options = (-100, 30.0 if every_option else None, 1.0)
        saved = linear_cross_entropy.linear_cross_entropy_loss(
            x, w, b, target, weight, meta(rows), on_all, on_all, *options, True, True
        )
        linear_cross_entropy.linear_cross_entropy_loss_backward(*saved, dtype, dtype)
        linear_cross_entropy.linear_cross_entropy_forward(
            x, w, b, target, weight, every_option, *options
        )
        linear_cross_entropy.linear_cross_entropy_backward(
            meta(rows), meta(rows), on_all, x, w, b, target, weight, meta(rows), meta(rows),
            *options, True, True,
        )  # fmt: skip

    name = f"{rows} rows{', bias' if bias else ''}{', every option' if every_option else ''}"
    return Case(name, run, {"_forward": ("LDG.E.128",), "_backward": LOADS}, dtypes)


CASES = [
    _case(100, bias=True, every_option=True, dtypes=(torch.bfloat16,)),
    _case(100, bias=False, every_option=False, dtypes=(torch.float32, torch.float16)),
]
