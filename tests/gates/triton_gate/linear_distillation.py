"""Cases of the Triton gate for linear_distillation; see tests/gates/triton_gate/__main__.py.

The host functions run on tensors without memory: this shows that none of them waits for a GPU.
"""

import torch

from fastlm.kernels import linear_distillation
from triton_gate import Case, meta


def _case(kind: str, *, every_option: bool, dtypes: tuple) -> Case:
    def run(dtype: torch.dtype) -> None:
        rows, classes = 100, 32000
        x, w = meta(rows, 1024, dtype=dtype), meta(classes, 1024, dtype=dtype)
        teacher = meta(rows, 2048, dtype=dtype), meta(classes, 2048, dtype=dtype)
        keep = meta(rows, dtype=torch.bool) if every_option else None
        softcap = 30.0 if every_option else None
        options = (keep, kind, 0.3, 0.5, softcap, softcap, 1.0)
        saved = linear_distillation.linear_distillation_forward(
            x, w, *teacher, *options, True, True
        )
        linear_distillation.linear_distillation_backward(*saved, dtype)
        linear_distillation.linear_distillation_forward(x, w, *teacher, *options, False, False)

    name = f"{kind}{', every option' if every_option else ''}"
    return Case(name, run, {"_forward": ("LDG.E.128",), "_rows": ("LDG.E.128",)}, dtypes)


CASES = [
    _case("jsd", every_option=True, dtypes=(torch.bfloat16,)),
    _case("jsd", every_option=False, dtypes=(torch.float32,)),
    _case("forward", every_option=False, dtypes=(torch.bfloat16,)),
    _case("reverse", every_option=True, dtypes=(torch.float16,)),
]
