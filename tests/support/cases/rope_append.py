"""rope_append as cases: rope and paged_append of a decode step in one launch."""

from collections.abc import Sequence
from random import Random

import torch
from tolerance import FOUR_ROUNDINGS, SMALLEST
from torch import Tensor

from cases import paged_append
from cases.base import Case, Op, OpCall, Row, assert_same, choice_or_none, size
from cases.rope import turned
from fastlm.ops.rope_append import rope_append


def build(case: Case, dtype: torch.dtype) -> OpCall:
    """The tables are random, with every angle once: only the elementwise formula yields these
    results. Their last rows are missing where `rows` is less than the positions.
    """
    (b, s, h), (d, dv, rotary), (page_size, per) = case["shape"], case["widths"], case["pages"]
    hkv = case["kv_heads"]
    table, positions = paged_append.page_table(case)
    q, k, v = (torch.randn(b, s, n, w).to(dtype) for n, w in ((h, d), (hkv, d), (hkv, dv)))
    cos, sin = torch.randn(2, case["rows"] or page_size * per, rotary).unbind()
    caches = [torch.randn(b * per + 2, page_size, hkv, n).to(dtype) for n in (d, dv)]

    def function(q, k, v, cos, sin, k_cache, v_cache, table, positions):
        q = rope_append(
            q, k, v, cos.contiguous(), sin.contiguous(), k_cache, v_cache, table,
            positions.contiguous(),
        )  # fmt: skip
        return q, k_cache, v_cache

    def verify(leaves: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """float32 within four roundings of its terms, then one rounding; the rest to the bit."""
        q, k, v, cos, sin, *caches, table, positions = leaves
        at = positions.long().clamp(0, len(cos) - 1)
        cos, sin = (t.double()[at].unsqueeze(2) for t in (cos, sin))

        def between(x: Tensor) -> list[Tensor]:
            truth = turned(x.double(), cos, sin, False)
            partner = x.double().abs()
            partner[..., :rotary] = partner[..., :rotary].roll(rotary // 2, -1)
            terms = x.double().abs()[..., :rotary] * cos.abs() + partner[..., :rotary] * sin.abs()
            error = torch.zeros_like(truth)
            error[..., :rotary] = FOUR_ROUNDINGS * terms + SMALLEST[torch.float32]
            return [(truth - error).float().to(x.dtype), (truth + error).float().to(x.dtype)]

        ends = [
            (q, *paged_append.expected_caches(k, v, *caches, table, positions))
            for q, k in zip(between(q), between(k))
        ]
        for name, got, low, high in zip(("q", "k_cache"), results, *ends):
            wrong = ~((low <= got) & (got <= high))
            assert not wrong.any(), f"{name}: {int(wrong.sum())} of {got.numel()} are wrong"
        assert_same([ends[0][2]], [results[2]], "v_cache")

    leaves = [q, k, v, cos, sin, *caches, table, positions]
    return OpCall(function, leaves, verify=verify, differentiable=False, dense=(5, 6, 7))


def draw(r: Random, isa: str) -> Case:
    d, page_size = r.choice([8, 16, 22, 64]), r.choice([1, 5, 8, 16])
    return case(
        r.choice([1, 2, 3]), r.choice([1, 1, 2, page_size]), r.choice([2, 4, 6]),
        r.choice([1, 2, 3]),
        widths=(d, r.choice([8, 9, d]), r.choice([d, d // 4 * 2])),
        pages=(page_size, 3),
        absent=choice_or_none(r, 0.3) or 0.0,
        rows=choice_or_none(r, 1, size(r, 3 * page_size, 1)) or 0,
    )  # fmt: skip


def case(b, s, h, hkv, *, widths, pages, absent=0.0, rows=0) -> Case:
    """`widths`: of q and k, of v, of the rotation; `rows`: of the tables, 0 for one a position."""
    return {
        "shape": [b, s, h], "kv_heads": hkv, "widths": list(widths), "pages": list(pages),
        "absent": absent, "wide": False, "rows": rows,
    }  # fmt: skip


OP = Op(
    build,
    draw,
    ("cuda",),
    rows={
        "whole heads": Row(case(2, 1, 6, 2, widths=(64, 64, 64), pages=(16, 3))),
        "part of a head": Row(case(3, 2, 3, 1, widths=(40, 24, 16), pages=(5, 3)), bits=True),
        "element by element": Row(case(1, 3, 2, 2, widths=(22, 9, 10), pages=(1, 3)), bits=True),
        # of the widths only one is no multiple of four
        "v in elements": Row(case(1, 2, 2, 1, widths=(16, 10, 8), pages=(2, 3))),
        "a rotation in elements": Row(case(1, 2, 2, 1, widths=(16, 8, 12), pages=(2, 3))),
        "several blocks a token": Row(case(1, 1, 64, 8, widths=(128, 128, 128), pages=(32, 3))),
        "many tokens": Row(case(2, 9, 4, 4, widths=(32, 8, 32), pages=(7, 3))),
        # q is rotated nevertheless, by the nearest row of the tables
        "tokens without a place": Row(
            case(6, 4, 4, 2, widths=(16, 16, 16), pages=(4, 3), absent=0.4)
        ),
        "few rows of the tables": Row(
            case(4, 3, 4, 2, widths=(16, 16, 16), pages=(4, 3), rows=5)
        ),
        "no tokens": Row(case(2, 0, 4, 2, widths=(16, 16, 16), pages=(4, 3))),
    },
    small={"": case(3, 1, 4, 2, widths=(16, 16, 8), pages=(8, 3))},
    batches={
        "": [
            case(b, s, 6, 2, widths=(16, 16, 8), pages=(8, per))
            for b, s, per in ((3, 5, 4), (7, 9, 11))
        ]
    },
)  # fmt: skip
