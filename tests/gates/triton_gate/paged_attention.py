"""Cases of the Triton gate for paged_attention; see tests/gates/triton_gate/__main__.py."""

import torch

from fastlm.kernels import paged_attention
from fastlm.reference import AttentionOptions
from triton_gate import MATRIX, Case, meta


def _case(name: str, queries: int, width: int, page_size: int, int8: bool, loads: str) -> Case:
    def run(dtype: torch.dtype) -> None:
        q = meta(4, queries, 32, width, dtype=dtype)
        cache = meta(512, page_size, 8, width, dtype=torch.int8 if int8 else dtype)
        scales = meta(8) if int8 else None
        table, lens = meta(4, 512, dtype=torch.int32), meta(4, dtype=torch.int32)
        paged_attention.paged_attention(
            q, cache, cache, table, lens, scales, scales, None, None, None,
            AttentionOptions(True, width**-0.5),
        )  # fmt: skip

    return Case(name, run, {"_forward": (*MATRIX, loads)}, (torch.bfloat16,))


CASES = [
    _case("decoding 128, pages of 16", 1, 128, 16, False, "LDGSTS"),
    _case("decoding 128, int8", 1, 128, 16, True, "LDG.E.128"),
    _case("prefill 128, pages of 16", 512, 128, 16, False, "LDGSTS"),
]
