"""Cases of the Triton gate for linear_logprobs; see tests/gates/triton_gate/__main__.py.

The kernels are linear_cross_entropy's and also compute the entropy. The host functions run on
tensors without memory: this shows that none of them waits for a GPU.
"""

import torch

from fastlm.kernels import linear_logprobs
from triton_gate import LOADS, Case, meta


def _case(rows: int, *, bias: bool, softcap: float | None, dtypes: tuple) -> Case:
    def run(dtype: torch.dtype) -> None:
        width, classes = 1024, 32000
        x, w = meta(rows, width, dtype=dtype), meta(classes, width, dtype=dtype)
        b, target = meta(classes, dtype=dtype) if bias else None, meta(rows, dtype=torch.int64)
        options = (-100, softcap, 0.7)
        _, *saved = linear_logprobs.linear_logprobs_forward(x, w, b, target, True, *options)
        linear_logprobs.linear_logprobs_backward(
            meta(rows), meta(rows), x, w, b, target, *saved, *options, True, True
        )

    name = f"{rows} rows{', bias' if bias else ''}{', softcap' if softcap else ''}"
    return Case(name, run, {"_forward": ("LDG.E.128",), "_backward": LOADS}, dtypes)


CASES = [
    _case(100, bias=True, softcap=30.0, dtypes=(torch.bfloat16, torch.float32)),
    _case(4096, bias=False, softcap=None, dtypes=(torch.float16,)),  # these rows are not split
]
