"""paged_attention as cases."""

import contextlib
from random import Random

import torch
from torch import Tensor

from cases.attention import CPU, Dense, attention_call, sinks_of, wide
from cases.base import DTYPES, SLOW, Case, Op, OpCall, Row, choice_or_none, drop_unset, size
from fastlm import backend, ops
from fastlm.cuda.paged_attention import SUPPORT


def pages(
    lengths: list[int], page_size: int, heads: int, d: int, dv: int, dtype: torch.dtype
) -> list[Tensor]:
    """Return caches, table and lengths. Pages are in random order, NaN follows a sequence's last
    key, and entries of the table after its last page are out of range.
    """
    counts = [-(-n // page_size) for n in lengths]
    total = sum(counts) + 2
    caches = [torch.randn(total, page_size, heads, n) for n in (d, dv)]
    if dtype == torch.int8:
        caches = [(40 * t).clamp(-127, 127).round() for t in caches]
    caches = [t.to(dtype) for t in caches]
    order = torch.randperm(total)
    table = torch.full((len(lengths), max([*counts, 1])), 2**31 - 1, dtype=torch.int32)
    for b, (count, n) in enumerate(zip(counts, lengths)):
        table[b, :count], order = order[:count].int(), order[count:]
        if dtype != torch.int8 and n % page_size:
            for t in caches:
                t[table[b, count - 1], n % page_size :] = float("nan")
    return [*caches, table, torch.tensor(lengths, dtype=torch.int32)]


def gather_pages(cache: Tensor, table: Tensor, lengths: list[int]) -> Tensor:
    """Gather the keys or values of each sequence (B, Hkv, longest, width), padded with zeros."""
    longest, page_size = max(lengths, default=0), cache.shape[1]
    sequences = cache.new_zeros(len(lengths), longest, *cache.shape[2:])
    for b, n in enumerate(lengths):
        sequences[b, :n] = cache[table[b, : -(-n // page_size)].long()].flatten(0, 1)[:n]
    return sequences.transpose(1, 2)


def supported_backend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor
) -> contextlib.AbstractContextManager:
    """Run on the reference what the forced CUDA kernel does not support."""
    unsupported = backend.forced_backend() in ("simt", "cuda") and not SUPPORT.predicate(
        q, k_cache, v_cache
    )
    return backend.use_backend("reference") if unsupported else contextlib.nullcontext()


def build(case: Case, dtype: torch.dtype) -> OpCall:
    (h, hkv), (d, dv), lengths = case["heads"], case["widths"], case["lengths"]
    queries, int8, options = case["queries"], case["int8"], dict(case["options"])
    if case.get("few") and dtype == torch.float32:  # what the CUDA kernel serves
        h = min(h, 8 * hkv)
        queries = min(queries, 8 * hkv // h)
    names = "k_cache", "v_cache", "block_table", "seq_lens"
    cache = pages(lengths, case["page_size"], hkv, d, dv, torch.int8 if int8 else dtype)
    leaves = {"q": torch.randn(len(lengths), queries, h, d).to(dtype), **dict(zip(names, cache))}
    if int8 == "number":
        options |= {"k_scale": 0.02, "v_scale": 0.03}
    elif int8:
        leaves["k_scale"] = torch.rand(hkv) * 0.02
        leaves["v_scale"] = torch.rand(hkv if int8 == "heads" else ()) * 0.03
    if bias := options.pop("bias", False):  # or the dtype of one of the heads
        shape = (queries,) if bias is True else (h, 1)
        leaves["bias"] = torch.randn(*shape, max([1, *lengths])).to(DTYPES.get(bias, dtype))
    if options.pop("sinks", False):
        leaves["sinks"] = sinks_of(case, h, dtype)
    if options.pop("alibi_slopes", False):
        leaves["alibi_slopes"] = torch.rand(h)

    def spread(bias):
        longest = max(lengths, default=0)
        return wide(bias)[..., :longest].expand(len(lengths), h, queries, longest)

    def dense(x):
        q, lens = x["q"].transpose(1, 2), x["seq_lens"].long()[:, None, None, None]
        i, j = (torch.arange(n, device=q.device) for n in (queries, max(lengths, default=0)))
        k, v = (gather_pages(x[f"{n}_cache"], x["block_table"], lengths) for n in "kv")
        if int8:
            kind = torch.promote_types(q.dtype, torch.float32)
            scales = (x.get(n, options.get(n)) for n in ("k_scale", "v_scale"))
            scales = (torch.as_tensor(t, dtype=torch.float32, device=q.device) for t in scales)
            k, v = (t.to(kind) * by.to(kind).reshape(-1, 1, 1) for t, by in zip((k, v), scales))
        return Dense(
            q, k, v, i[:, None] + lens - queries - j, j < lens, x.get("sinks"),
            x.get("alibi_slopes"), spread(x["bias"]) if "bias" in x else None, None,
            *(options.get(name) for name in ("causal", "scale", "window", "softcap")),
        )  # fmt: skip

    def call(**leaves):
        with supported_backend(*(leaves[name] for name in ("q", "k_cache", "v_cache"))):
            return ops.paged_attention(**leaves, **options, return_lse=True)

    def other(t):
        return t.transpose(1, 2)

    return attention_call(
        leaves, call, dense, spread, rows=(other, other), differentiable=False,
    )  # fmt: skip


def draw(r: Random, isa: str) -> Case:
    hkv, groups = r.choice([1, 2, 3]), r.choice([1, 1, 2, 4, 9])
    max_length = 300 if isa in SLOW or isa == "simt" else 1500
    widths = [size(r, 130, 1), size(r, 130, 1)]
    if isa == "simt" and r.random() < 0.8:  # the kernels accept no other widths
        step = r.choice([8, 16, 16])
        widths = [-(-n // step) * step for n in widths]
    return {
        "lengths": [size(r, max_length) for _ in range(r.choice([1, 1, 2, 4]))],
        "page_size": r.choice([1, 3, 7, 16, 32, 256]),
        "queries": r.choice([0, 1, 1, 1, 2, 3, 20, 40]),
        "heads": [hkv * groups, hkv],
        "widths": widths,
        "int8": r.choice([None, "number", "heads"]),
        "options": drop_unset(
            causal=r.random() < 0.6,
            window=choice_or_none(r, 1, 30, 200),
            softcap=choice_or_none(r, 4.0),
            bias=r.random() < 0.2,
            sinks=r.random() < 0.3,
            alibi_slopes=r.random() < 0.3,
        ),
    }


def case(
    lengths: list[int], page_size: int, queries=1, *, heads=(4, 2), widths=(40, 24), int8=None,
    few=False, infinite_sink=False, **options,
) -> Case:  # fmt: skip
    return {
        "lengths": lengths, "page_size": page_size, "queries": queries, "heads": [*heads],
        "widths": [*widths], "int8": int8, "options": options,
        **drop_unset(few=few, infinite_sink=infinite_sink),
    }  # fmt: skip


OPTIONS = {
    "causal": {"causal": True},
    "window, sinks": {"causal": True, "window": 30, "sinks": True},
    "softcap, alibi, bias": {"softcap": 3.0, "alibi_slopes": True, "bias": True},
}
EVERYTHING = {"causal": True, "window": 30, "softcap": 3.0, "sinks": True, "alibi_slopes": True}
EVERYTHING["bias"] = True
GPU, CUDA, TRITON = ("triton", "cuda"), ("cuda",), ("triton",)

OP = Op(
    build,
    draw,
    rows={
        # a sequence without keys between others; decoding, a few rows, blocks of them
        **{
            f"{queries} queries, pages of {page}, {name}": Row(
                case([53, 0, 700], page, queries, **options), on=CPU
            )
            for queries, page in ((1, 7), (3, 1), (20, 256))
            for name, options in OPTIONS.items()
        },
        # CUDA: 2 rows a key head by dot products, 6 and 18 by matrix instructions
        **{
            f"rows of {queries} queries, pages of {page}, {name}": Row(
                case([53, 0, 130], page, queries, few=True, **options), on=GPU
            )
            for queries, page in ((1, 7), (3, 64), (9, 1))
            for name, options in OPTIONS.items()
        },
        # tiles of rows
        "20 queries": Row(case([53, 0, 130], 7, 20, **EVERYTHING), on=TRITON),
        "decode": Row(case([90, 3], 16, widths=(32, 32), causal=True), bits=True),
        "4 queries": Row(case([90, 3], 16, 4, widths=(32, 16), **EVERYTHING), bits=True),
        "blocks of rows": Row(
            case([300, 40], 16, 30, widths=(32, 32), causal=True), on=CPU, bits=True
        ),
        # a scale for all heads, for each, and one of each kind
        **{
            f"int8, {kind}, {queries} queries": Row(
                case([90, 333], 16, queries, widths=(64, 64), int8=kind, causal=True), on=CPU
            )
            for kind in ("number", "heads", "mixed")
            for queries in (1, 20)
        },
        **{
            f"int8, {kind}": Row(
                case([90, 70], 16, queries, widths=(32, 64), int8=kind, causal=True), on=TRITON
            )
            for kind, queries in (("number", 1), ("heads", 20), ("mixed", 1))
        },
        # int8 by dot products and by matrix instructions, with columns that do not fill a tile
        **{
            f"int8, {queries} queries of {group} heads, {widths[0]} and {widths[1]} wide": Row(
                case(
                    [90, 70], 16, queries, heads=(2 * group, 2), widths=widths, int8="mixed",
                    few=True, causal=True,
                ),
                on=CUDA,
            )
            for queries, group, widths in (
                (1, 1, (64, 64)), (1, 4, (48, 80)), (3, 2, (24, 40)), (5, 4, (16, 160)),
                (2, 4, (256, 16)),
            )
        },
        # the widest and the narrowest; more heads than a tile has rows, and than a block has
        **{
            f"{group} heads, {widths[0]} and {widths[1]} wide": Row(
                case([70], 16, heads=(group, 1), widths=widths, few=True, causal=True), on=CUDA
            )
            for group, widths in (
                (1, (16, 256)), (16, (256, 16)), (33, (72, 128)), (3, (64, 8)), (71, (64, 64)),
            )
        },
        # tiles that every row sees, and tiles at both ends of what a row sees
        **{
            f"{queries} queries, a window of {window}": Row(
                case(
                    [410, 139], 16, queries, heads=(2, 1), widths=(16, 16), few=True, causal=True,
                    window=window,
                ),
                on=CUDA,
            )
            for queries in (1, 3, 9)
            for window in (67, 140)
        },
        # each has its own threads in the kernel that divides the work
        "more sequences than threads": Row(
            case([37 * i % 91 for i in range(300)], 32, heads=(1, 1), widths=(8, 8), causal=True),
            on=CUDA,
        ),
        "a bias of another dtype": Row(case([60, 33], 16, 4, widths=(16, 16), bias="bfloat16")),
        "fewer keys than queries, sinks": Row(
            case([2], 4, 3, widths=(16, 16), infinite_sink=True, causal=True, sinks=True)
        ),
        "no sequences": Row(case([], 4, widths=(16, 16))),
        "no queries": Row(case([5], 4, 0, widths=(16, 16))),
        "no keys": Row(case([0, 0], 4, widths=(16, 16))),
        "split": Row(
            case([700, 3, 1500], 16, heads=(8, 2), widths=(64, 64), causal=True), on=CPU, split=True
        ),
        "split int8": Row(
            case([700, 3, 1500], 7, 2, heads=(8, 2), widths=(64, 48), int8="heads", causal=True),
            on=CPU, split=True,
        ),
        "split prefill": Row(
            case([300, 40], 16, 130, widths=(32, 32), int8="number", causal=True, sinks=True),
            on=CPU, split=True,
        ),
    },
    small={
        "everything": case([9, 20], 4, 3, widths=(16, 16), **EVERYTHING),
        "int8": case([9, 20], 4, 3, widths=(16, 16), int8="heads"),
    },
    batches={
        # other numbers of sequences, queries and pages
        "causal": [
            case([9, 20, *more], 4, queries, widths=(16, 16), causal=True)
            for queries, more in ((6, [7]), (8, [30, 2, 4]), (11, [1, 1, 1, 60, 5]))
        ],
    },
    any_strides=("cpu", "triton"),  # CUDA: other kernels for rows that are not aligned
)  # fmt: skip
