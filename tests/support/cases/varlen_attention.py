"""varlen_attention as cases."""

from random import Random

import torch
from torch import Tensor

from cases.attention import CPU, TRITON, Dense, attention_call, dropout_factors, sinks_of, wide
from cases.base import SLOW, Case, Op, OpCall, Row, choice_or_none, drop_unset, size
from fastlm import ops
from fastlm.ops.attention import dropout_seed


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def sequence_positions(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return the sequence of each packed row, and the row's position in it."""
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).long())
    return numbers, torch.arange(len(numbers)) - offsets(lengths)[numbers]


def build(case: Case, dtype: torch.dtype) -> OpCall:
    lengths, (h, hkv), (d, dv) = case["lengths"], case["heads"], case["widths"]
    queries, keys = ([pair[i] for pair in lengths] for i in (0, 1))
    options = dict(case["options"])
    leaves = {
        "q": torch.randn(sum(queries), h, d).to(dtype),
        "k": torch.randn(sum(keys), hkv, d).to(dtype),
        "v": torch.randn(sum(keys), hkv, dv).to(dtype),
        "cu_seqlens_q": offsets(queries),
        "cu_seqlens_k": offsets(keys),
    }
    if dims := options.pop("bias", None):
        dims = "bst" if dims is True else dims
        full = zip("bhst", (len(lengths), h, max(queries), max(keys)))
        leaves["bias"] = torch.randn([n if x in dims else 1 for x, n in full]).to(dtype)
    if options.pop("sinks", False):
        leaves["sinks"] = sinks_of(case, h, dtype)
    if options.pop("alibi", False):
        leaves["alibi_slopes"] = torch.rand(h)
    p = options.get("dropout_p", 0.0)
    (of_q, i), (of_k, j) = sequence_positions(queries), sequence_positions(keys)
    shift = torch.tensor(keys).long() - torch.tensor(queries).long()
    distance, inside = (i + shift[of_q])[:, None] - j, of_q[:, None] == of_k

    def spread(bias):
        """To all pairs of packed rows and keys, those of two sequences too."""
        rows = tuple(x if n > 1 else x * 0 for x, n in zip((of_q, i, j), bias[:, 0].shape))
        pairs = wide(bias)[rows[0][:, None], :, rows[1][:, None], rows[2]]
        return pairs.permute(2, 0, 1)[None].expand(1, h, -1, -1)

    def keep(seed):
        factor = torch.zeros(1, h, len(of_q), len(of_k))
        for b, (start_q, start_k) in enumerate(zip(offsets(queries), offsets(keys))):
            if b < len(lengths):
                s, t = lengths[b]
                part = factor[:, :, start_q : start_q + s, start_k : start_k + t]
                part.copy_(dropout_factors(seed, p, h, range(b, b + 1), s, t))
        return factor

    def dense(x):
        device, seed = x["q"].device, dropout_seed(p, x["q"])
        q, k, v = (x[n].transpose(0, 1)[None] for n in "qkv")
        return Dense(
            q, k, v, distance[None, None].to(device), inside[None, None].to(device),
            x.get("sinks"), x.get("alibi_slopes"), spread(x["bias"]) if "bias" in x else None,
            None if seed is None else keep(seed.cpu()).to(device),
            *(options.get(name) for name in ("causal", "scale", "window", "softcap")),
        )  # fmt: skip

    def call(**leaves):
        return ops.varlen_attention(**leaves, **options, return_lse=True)

    return attention_call(
        leaves, call, dense, spread,
        rows=(lambda t: t[0].transpose(0, 1), lambda t: t.transpose(0, 1)[None]),
        lse=(lambda t: t[0], lambda t: t[None]),
    )  # fmt: skip


def draw(r: Random, isa: str) -> Case:
    hkv, groups = r.choice([1, 2, 3, 8]), r.choice([1, 1, 2, 4])
    work = 2e6 if isa in SLOW else 4e7
    while True:
        lengths = [[size(r, 150), size(r, 400)] for _ in range(r.choice([1, 2, 4, 7]))]
        if r.random() < 0.4:  # self-attention
            lengths = [[s, s] for s, _ in lengths]
        total = sum(t for _, t in lengths)
        if hkv * groups * sum(s for s, _ in lengths) * total * (total + 100) <= work:
            break
    full = max(s for s, _ in lengths) and max(t for _, t in lengths)
    options = drop_unset(
        causal=r.random() < 0.6,
        window=choice_or_none(r, 1, 30, 100),
        softcap=choice_or_none(r, 4.0),
        bias=bool(full) and r.random() < 0.3,
        sinks=r.random() < 0.3,
        alibi=r.random() < 0.3,
        dropout_p=choice_or_none(r, 0.3),
    )
    heads, widths = [hkv * groups, hkv], [size(r, 100, 1), size(r, 100, 1)]
    return {"lengths": lengths, "heads": heads, "widths": widths, "options": options}


def case(queries: list[int], keys: list[int], *, heads=(4, 2), widths=(24, 40), **options) -> Case:
    lengths = [[s, t] for s, t in zip(queries, keys, strict=True)]
    return {"lengths": lengths, "heads": [*heads], "widths": [*widths], "options": options}


SCORES = {"causal": True, "window": 50, "softcap": 4.0, "alibi": True, "sinks": True}
EVERYTHING = {**SCORES, "bias": "bst", "dropout_p": 0.3}
BLOCKS = [5, 0, 130, 1, 37], [9, 3, 300, 1, 0]  # empty on either side
TILES = [5, 0, 70, 1, 37], [9, 3, 40, 1, 0]

OP = Op(
    build,
    draw,
    ("cpu", "triton"),
    rows={
        "blocks": Row(case(*BLOCKS, causal=True), on=CPU),
        "blocks, everything": Row(case(*BLOCKS, **EVERYTHING), on=CPU),
        "tiles": Row(case(*TILES, causal=True, widths=(16, 24)), on=TRITON),
        "tiles, everything": Row(case(*TILES, **EVERYTHING, widths=(16, 24)), on=TRITON),
        "themselves": Row(case([33, 64], [33, 64], **SCORES), on=CPU, bits=True),
        "between empty ones": Row(
            case([0, 33, 0], [0, 33, 0], **EVERYTHING, heads=(2, 1), widths=(16, 24)), bits=True
        ),
        "a bias of each head": Row(
            case([3, 20, 9], [5, 40, 2], bias="ht", scale=-0.4, heads=(2, 1), widths=(16, 16))
        ),
        "a bias of rows": Row(
            case([3, 20, 9], [5, 40, 2], bias="bs", causal=True, heads=(2, 1), widths=(16, 16))
        ),
        "many keys": Row(case([7], [530], **EVERYTHING), on=CPU),
        "a row and many keys": Row(case([1], [70], **EVERYTHING, widths=(16, 24)), on=TRITON),
        # a backward of its own; more sequences than are kept on the stack
        "8 queries and keys": Row(case([3, 8, 1], [5, 8, 2], **SCORES, dropout_p=0.3), on=CPU),
        "17 sequences": Row(
            case([*range(17)], [3] * 17, causal=True, sinks=True, widths=(9, 7)), bits=True, on=CPU
        ),
        "no sequences": Row(case([], [], widths=(16, 16))),
        "empty sequences": Row(case([0, 0, 0], [0, 2, 0], widths=(16, 16), sinks=True)),
        "split": Row(
            case(
                [100, 0, 130, 7], [260, 5, 130, 600], heads=(6, 2), widths=(40, 24), causal=True,
                window=300, softcap=9.0, alibi=True, sinks=True, bias="bst",
            ),
            on=CPU, split=True,
        ),
    },
    small={
        "everything": case([2, 0, 3], [2, 1, 3], **EVERYTHING, heads=(2, 1), widths=(3, 2)),
        "plain": case([2, 3], [2, 3], heads=(2, 1), widths=(2, 2)),
    },
    batches={
        "causal": [
            case(n, n, causal=True, widths=(16, 16)) for n in ([4, 5], [7, 1, 3], [2, 2, 2, 9])
        ],
    },
)  # fmt: skip
