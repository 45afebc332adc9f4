"""paged_append as cases. It is exact: results are compared to the last bit."""

import math
from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from cases.base import Case, Op, OpCall, Row, assert_same, choice_or_none, size
from fastlm import ops

FAR = 2**32  # a number that is in range again if it is cut to 32 bits


def page_table(case: Case) -> tuple[Tensor, Tensor]:
    """Return a table of shuffled pages, two of which belong to no sequence, and positions. Some
    tokens get no slot: their entry of the table or their position is out of range.
    """
    b, s, _ = case["shape"]
    page_size, per = case["pages"]
    pages, slots = b * per + 2, page_size * per
    table = torch.randperm(pages)[: b * per].view(b, per)
    positions = torch.randint(0, max(slots - s, 0) + 1, (b, 1)) + torch.arange(s)
    for t, end in ((table, pages), (positions, slots)):
        absent = torch.rand(t.shape) < case["absent"]
        turn = torch.arange(int(absent.sum()))  # every kind of bad number in turn
        bad = torch.tensor([-1, end, -(2**31), 2**31 - 1])[turn % 4]
        if case["wide"]:
            bad = t[absent] + torch.tensor([FAR, -FAR])[turn % 2]
        t[absent] = bad
    kind = torch.int64 if case["wide"] else torch.int32
    return table.to(kind), positions.to(kind)


def expected_caches(k, v, k_cache, v_cache, table, positions, *scales) -> list[Tensor]:
    """Append to copies of the caches, token by token."""
    caches = [k_cache.clone(), v_cache.clone()]
    page_size = k_cache.shape[1]
    for b, s in torch.cartesian_prod(torch.arange(k.shape[0]), torch.arange(k.shape[1])).tolist():
        entry, slot = divmod(int(positions[b, s]), page_size)
        page = int(table[b, entry]) if 0 <= entry < table.shape[1] else -1
        if not 0 <= page < len(k_cache):
            continue
        for x, cache, scale in zip((k, v), caches, scales or (None, None)):
            row = x[b, s]
            if scale is not None:
                row = (row.float() / scale[:, None]).round().clamp(-127, 127)
            cache[page, slot] = row.to(cache.dtype)
    return caches


def build(case: Case, dtype: torch.dtype) -> OpCall:
    b, s, hkv = case["shape"]
    kind = torch.int8 if case["int8"] else dtype
    table, positions = page_table(case)
    pages, page_size = b * case["pages"][1] + 2, case["pages"][0]
    x = [torch.randn(b, s, hkv, width) * case["spread"] for width in case["widths"]]
    scales = torch.rand(2, hkv) * 0.02 + 0.01
    if case["ties"]:  # between two codes, and beyond the last
        halves = torch.tensor([0.5, 1.5, -0.5, -2.5, 126.5, 127.5, -127.5, 200, torch.inf])
        halves = torch.cat((halves, -halves))
        x, scales = [halves[torch.randint(len(halves), t.shape)] for t in x], torch.ones(2, hkv)
    caches = [torch.randint(-127, 128, (pages, page_size, hkv, n)).to(kind) for n in case["widths"]]

    def function(k, v, k_cache, v_cache, table, positions, k_scale=None, v_scale=None):
        ops.paged_append(k, v, k_cache, v_cache, table, positions, k_scale=k_scale, v_scale=v_scale)
        return k_cache, v_cache

    def verify(leaves: Sequence[Tensor], caches_after: Sequence[Tensor]) -> None:
        assert_same(expected_caches(*leaves), caches_after, "caches")

    leaves = [*(t.to(dtype) for t in x), *caches, table, positions]
    leaves += scales.unbind() if case["int8"] else []
    return OpCall(function, leaves, verify=verify, differentiable=False, dense=(2, 3))


def draw(r: Random, isa: str) -> Case:
    widths = [size(r, 130, 1), size(r, 130, 1)]
    if r.random() < 0.5:
        widths = [-(-n // 16) * 16 for n in widths]
    pages = [r.choice([1, 3, 7, 16]), r.choice([1, 2, 5])]
    return {
        "shape": [r.choice([0, 1, 2, 5]), size(r, math.prod(pages)), r.choice([1, 2, 3, 9])],
        "widths": widths,
        "pages": pages,
        "int8": r.random() < 0.5,
        "absent": choice_or_none(r, 0.3) or 0.0,
        "wide": r.random() < 0.3,
        "spread": r.choice([1.0, 10.0]),
        "ties": r.random() < 0.2,
    }


def case(b, s, hkv, *, widths, pages, int8=False, absent=0.0, wide=False, ties=False) -> Case:
    """`pages`: slots of a page, pages of a sequence."""
    return {
        "shape": [b, s, hkv], "widths": list(widths), "pages": list(pages), "int8": int8,
        "absent": absent, "wide": wide, "spread": 1.0, "ties": ties,
    }  # fmt: skip


def both_caches(name: str, row: Row) -> dict[str, Row]:
    return {name: row, f"{name}, int8": row._replace(case=row.case | {"int8": True})}


OP = Op(
    build,
    draw,
    ("triton", "cuda"),  # C++ has none: the reference runs there
    rows={
        **both_caches("vectors", Row(case(3, 1, 2, widths=(64, 64), pages=(16, 5)))),
        **both_caches("k is wider", Row(case(2, 7, 3, widths=(40, 24), pages=(5, 5)), bits=True)),
        **both_caches("element by element", Row(case(1, 4, 2, widths=(33, 7), pages=(1, 5)))),
        # in vectors and in elements, of which a thread then takes two
        **both_caches(
            "several blocks a token",
            Row(case(5, 1, 9, widths=(128, 128), pages=(8, 5)), on=("cuda",)),
        ),
        **both_caches(
            "several elements a thread",
            Row(case(1, 2, 9, widths=(127, 128), pages=(8, 5)), on=("cuda",)),
        ),
        **both_caches(
            "tokens without a place", Row(case(6, 4, 2, widths=(16, 16), pages=(4, 5), absent=0.4))
        ),
        "numbers beyond 32 bits": Row(
            case(6, 4, 2, widths=(16, 16), pages=(4, 5), absent=0.4, wide=True)
        ),
        "no token has a place": Row(case(2, 3, 2, widths=(16, 16), pages=(4, 5), absent=1.0)),
        "ties and saturation": Row(
            case(2, 7, 2, widths=(16, 8), pages=(5, 3), int8=True, ties=True)
        ),
        "no tokens": Row(case(2, 0, 2, widths=(16, 8), pages=(5, 3))),
        "an empty table": Row(case(2, 3, 2, widths=(16, 8), pages=(5, 0))),
    },
    small={
        "float": case(3, 4, 2, widths=(16, 8), pages=(5, 3)),
        "int8": case(3, 4, 2, widths=(16, 8), pages=(5, 3), int8=True),
    },
    # all sizes differ because of duck sizing
    batches={
        name: [
            case(b, s, 3, widths=(16, 8), pages=(7, per), int8=name == "int8")
            for b, s, per in ((2, 4, 5), (6, 9, 11))
        ]
        for name in ("float", "int8")
    },
)  # fmt: skip
