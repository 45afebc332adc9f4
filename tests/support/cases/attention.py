"""attention as cases. The tables of the three attention ops share the formula on dense tensors, and
the sizes of its terms.
"""

import math
import mmap
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch
from tolerance import FOUR_ROUNDINGS, ULP
from torch import Tensor

from cases.base import (
    SLOW,
    Case,
    Op,
    OpCall,
    Row,
    Terms,
    choice_or_none,
    drop_unset,
    name_parameters,
    run,
    size,
)
from fastlm import backend, ops
from fastlm.ops.attention import dropout_seed
from fastlm.reference.dropout import dropout_factor

# A denormal that a kernel flushes, in the unit of tolerance.py's errors of float32
FLUSHED = 2.0**-126 / FOUR_ROUNDINGS


class Dense(NamedTuple):
    """A call on dense tensors."""

    q: Tensor  # (B, H, S, D)
    k: Tensor  # (B, Hkv, T, D)
    v: Tensor  # (B, Hkv, T, Dv)
    distance: Tensor  # i - j, (B or 1, 1, S, T): the last query is aligned to the last key
    inside: Tensor | None = None  # which of these pairs exist
    sinks: Tensor | None = None  # (H,)
    alibi_slopes: Tensor | None = None  # (H,)
    bias: Tensor | None = None  # (B, H, S, T)
    keep: Tensor | None = None  # dropout's factor, (B, H, S, T)
    causal: bool = False
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


class AttentionScores(NamedTuple):
    """Attention scores (B, H, S, T), -inf where a row does not see the key."""

    s: Tensor
    derivative: Tensor | float  # with respect to scale q k^T
    size: Tensor  # of the terms, whose roundings are the error


def scale_of(x: Dense) -> float:
    return x.q.shape[-1] ** -0.5 if x.scale is None else x.scale


def scores(x: Dense, k: Tensor) -> AttentionScores:
    """Compute the scores. k has the heads of q."""
    scale, derivative = scale_of(x), 1.0
    s = scale * (x.q @ k.mT)
    longer = 1 + x.q.shape[-1] ** 0.5 / 8  # more terms, more roundings of their sum
    size = s.abs() + longer * abs(scale) * (x.q.square() @ k.square().mT).sqrt()
    if x.softcap is not None:
        t = torch.tanh(s / x.softcap)
        s, derivative = x.softcap * t, 1 - t.square()
        size = size * derivative + s.abs()
    if x.alibi_slopes is not None:
        far = x.alibi_slopes.to(s.dtype)[:, None, None] * x.distance.abs()
        s, size = s - far, size + far.abs()
    if x.bias is not None:
        s, size = s + x.bias, size + x.bias.abs()
    hidden = torch.zeros_like(x.distance, dtype=torch.bool)
    if x.causal or x.window is not None:
        hidden = hidden | (x.distance < 0)
    if x.window is not None:
        hidden = hidden | (x.distance >= x.window)
    if x.inside is not None:
        hidden = hidden | ~x.inside
    s = s.masked_fill(hidden, -math.inf)
    return AttentionScores(s, derivative, (size + s.abs()).masked_fill(s == -math.inf, 0))


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t


def softmax(x: Dense, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities and lse; 0 and -inf in rows that see nothing."""
    terms = s
    if x.sinks is not None:
        terms = torch.cat((s, x.sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)), -1)
    blind = (terms == -math.inf).all(-1)
    lse = torch.logsumexp(terms.masked_fill(blind[..., None], 0), -1)
    return (s - lse.masked_fill(blind, 0)[..., None]).exp(), lse.masked_fill(blind, -math.inf)


def definition(x: Dense) -> tuple[Tensor, Tensor]:
    """Compute out and lse, in float32 or wider."""
    dtype, groups = x.q.dtype, x.q.shape[1] // x.k.shape[1]
    x = Dense(*(wide(t) if isinstance(t, Tensor) else t for t in x))
    k, v = (t.repeat_interleave(groups, 1) for t in (x.k, x.v))
    p, lse = softmax(x, scores(x, k).s)
    return ((p if x.keep is None else p * x.keep) @ v).to(dtype), lse


class Size(NamedTuple):
    """Sizes of the terms of each element; the same with the errors of float32 in them; and the sum
    of the squares of the terms that are rounded to the dtype.
    """

    scale: Tensor
    float32: Tensor
    squares: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Size":
        return Size(*map(function, self))


def sizes(x: Dense, upstream: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Size]:
    """Return the sizes of out, lse and the gradients, all in float64. That of dbias is for a bias
    (B, H, S, T).

    P has the error of its score and of lse. dS = P (dP - delta + dlse), and the difference may
    cancel to nothing. 16 bits: P and dS are rounded before they are multiplied. So is out, and its
    error in delta is the same for all keys of a row.
    """

    def rounded(t):  # the size by which t in `dtype` is rounded, squared
        smallest = torch.finfo(dtype).smallest_normal
        return t.abs().clamp_min(smallest).where(visible, 0).square()

    groups = x.q.shape[1] // x.k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (x.k, x.v))
    s, derivative, size = scores(x, k)
    visible = s > -math.inf
    p, lse = softmax(x, s)
    finite = lse.masked_fill(lse == -math.inf, 0)[..., None]
    of_lse = (p * size).sum(-1, keepdim=True) + finite.abs()
    sink = None
    if x.sinks is not None:
        sink = (x.sinks[:, None, None] - finite).exp()
        of_lse = of_lse + sink * x.sinks.abs().nan_to_num(posinf=0)[:, None, None]
    below = (s - finite).where(visible, 0).abs()
    error = p * (1 + size + of_lse + below) + FLUSHED  # of P
    keep = torch.ones_like(p) if x.keep is None else x.keep
    p_kept = p * keep
    out = p_kept @ v
    out_size = Size(p_kept @ v.abs(), (keep * error) @ v.abs(), rounded(p_kept) @ v.square())
    lse_terms = of_lse[..., 0] + math.log(s.shape[-1] + 1) + 1
    result = {
        "out": out_size,
        "lse": Size(finite[..., 0].abs(), lse_terms, torch.zeros_like(lse_terms)),
    }
    if not upstream:
        return result
    dout, dlse = upstream[0], upstream[1][..., None]
    slope = keep * (dout @ v.mT) - (dout * out).sum(-1, keepdim=True) + dlse
    of_delta = (dout * out).abs().sum(-1, keepdim=True) + dlse.abs()
    ds, ds_terms = p * slope, p * (keep * (dout.abs() @ v.abs().mT) + of_delta)
    # of delta, which has those of out
    delta_error = (dout.abs() * out_size.float32).sum(-1, keepdim=True)
    delta = (dout.square() * (out.square() + out_size.squares)).sum(-1, keepdim=True).sqrt()
    ds_error = ds_terms + slope.abs() * error + p * delta_error
    result["dscores"] = Size(ds_terms, ds_error, (p * delta).square())
    if sink is not None:
        of_sink = 1 + of_lse + x.sinks.abs().nan_to_num(posinf=0)[:, None, None]
        of_sink = of_delta * of_sink + delta_error
        dsinks = Size(sink * of_delta, sink * of_sink, (sink * delta).square())
        result["dsinks"] = dsinks.map(lambda t: t.sum((0, 2, 3)))
    scale = abs(scale_of(x))
    if x.softcap is not None:  # 1 - tanh^2 is a difference
        ds_error = ds_error * derivative + ds.abs()
        ds, ds_terms, p = ds * derivative, ds_terms * derivative, p * derivative
    on_q = rounded(ds) @ k.square() + (p @ k).square() * delta.square()
    result["dq"] = Size(scale * (ds_terms @ k.abs()), scale * (ds_error @ k.abs()), scale**2 * on_q)
    on_k = (rounded(ds) + (p * delta).square()).mT @ x.q.square()
    dk = Size(scale * (ds_terms.mT @ x.q.abs()), scale * (ds_error.mT @ x.q.abs()), scale**2 * on_k)
    dv = Size(
        p_kept.mT @ dout.abs(), (keep * error).mT @ dout.abs(), rounded(p_kept).mT @ dout.square()
    )
    for name, t in (("dk", dk), ("dv", dv)):
        result[name] = t.map(lambda t: t.unflatten(1, (-1, groups)).sum(2))
    return result


def over_bias(dscores: Size, bias: Tensor, spread: Callable[[Tensor], Tensor]) -> Size:
    """Return the sizes of the gradient of a bias, which `spread` maps to (B, H, S, T)."""
    if bias.shape[-1] == 1:  # the error of delta is that of all keys at once
        squares = torch.zeros_like(dscores.squares)
        squares[..., :1] = dscores.squares.sqrt().sum(-1, keepdim=True).square()
        dscores = dscores._replace(squares=squares)
    return dscores.map(lambda t: torch.func.vjp(spread, bias)[1](t)[0])


def same(t: Tensor) -> Tensor:
    return t


def attention_call(
    leaves: dict[str, Tensor],
    op: Callable[..., tuple[Tensor, Tensor]],
    dense: Callable[[dict[str, Tensor]], Dense],
    spread: Callable[[Tensor], Tensor],
    rows: tuple[Callable, Callable] = (same, same),
    lse: tuple[Callable, Callable] = (same, same),
    **options,
) -> OpCall:
    """Make a call of an attention op, and what its results are compared with.

    Args:
    op: the op, which takes its leaves by name.
    dense: the same op on dense tensors; `spread` maps its bias to (B, H, S, T).
    rows, lse: from (B, heads, length, width) and (B, H, S) to the op's layout, and back.
    """
    names, dtype = list(leaves), leaves["q"].dtype
    # a gradient that is not rounded itself has the roundings of out
    finer = {f"d{n}": ULP[dtype] / ULP[t.dtype] for n, t in leaves.items() if t.dtype in ULP}

    def function(*leaves):
        return op(**dict(zip(names, leaves)))

    def plain(*leaves):
        out, total = definition(dense(dict(zip(names, leaves))))
        return rows[0](out), lse[0](total)

    def terms(*tensors):
        leaves, upstream = dict(zip(names, tensors)), tensors[len(names) :]
        torch.manual_seed(5)  # as cases.base.run
        on = (rows[1](upstream[0]), lse[1](upstream[1])) if upstream else ()
        result = sizes(dense(leaves), on, dtype)
        if "bias" in leaves and upstream:
            result["dbias"] = over_bias(result["dscores"], leaves["bias"], spread)
        forms = {"lse": lse[0], "dbias": same, "dsinks": same}
        result = {n: t.map(forms.get(n, rows[0])) for n, t in result.items() if n != "dscores"}
        return {
            n: Terms(t.scale, t.float32, t.squares.sqrt() * finer.get(n, 1))
            for n, t in result.items()
        }

    constant = tuple(i for i, name in enumerate(names) if name == "alibi_slopes")
    return OpCall(
        name_parameters(function, names), list(leaves.values()), plain, terms, ("out", "lse"),
        constant=constant, **options,
    )  # fmt: skip


def assert_reference(op: Op) -> None:
    """Assert that the definition in fastlm.reference equals the formula here in float64."""
    for name, row in op.rows.items():
        call = op.build_for(row.case, torch.float64, "reference")
        how = {"differentiable": call.differentiable, "constant": call.constant}
        with backend.use_backend("reference"):
            actual, upstream = run(call.function, call.leaves, **how)
        expected, _ = run(call.plain, call.leaves, upstream, **how)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---- attention


def dropout_factors(
    seed: Tensor | None, p: float, heads: int, batch: range, queries: int, keys: int
):
    """Return dropout's factors (batch, heads, queries, keys), or None without a seed."""
    if seed is None:
        return None
    numbers = torch.tensor(list(batch), device=seed.device)
    return dropout_factor(seed, p, numbers, heads, torch.arange(queries, device=seed.device), keys)


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    i, j = torch.arange(queries, device=device), torch.arange(keys, device=device)
    return (i[:, None] + (keys - queries) - j)[None, None]


# the dimensions that a bias has; it is 1 in the others
BIAS = {"full": "bhst", "keys": "ht", "rows": "bs"}


def bias_of(case: Case, shape: tuple[int, ...]) -> Tensor:
    kind = case["options"]["bias"]
    dims = BIAS.get(kind, kind)
    bias = torch.randn([n if d in dims else 1 for d, n in zip("bhst", shape)])
    if "offset" in case:  # of all scores
        bias = torch.full_like(bias, case["offset"])
    if case.get("hidden"):  # a row sees nothing, another one only the last key
        bias[..., 1, :] = bias[..., 3, :-1] = -math.inf
    return bias if "b" in dims else bias[0]


def sinks_of(case: Case, heads: int, dtype: torch.dtype) -> Tensor:
    sinks = torch.randn(heads).to(torch.promote_types(dtype, torch.float32))
    if case.get("infinite_sink"):
        sinks[0] = -math.inf
    return sinks


def build(case: Case, dtype: torch.dtype) -> OpCall:
    b, h, hkv, s, t, d, dv = case["shape"]
    options = dict(case["options"])
    leaves = {
        "q": torch.randn(b, h, s, d).to(dtype),
        "k": torch.randn(b, hkv, t, d).to(dtype),
        "v": torch.randn(b, hkv, t, dv).to(dtype),
    }
    if case.get("peaked"):  # a key far above the others
        leaves["k"][:, :, 7] *= 30
    if options.pop("bias", None):
        leaves["bias"] = bias_of(case, (b, h, s, t)).to(dtype)
    if options.pop("sinks", False):
        leaves["sinks"] = sinks_of(case, h, dtype)
    if options.pop("alibi", False):
        leaves["alibi_slopes"] = torch.rand(h)
    p = options.get("dropout_p", 0.0)

    def spread(bias):
        return wide(bias).expand(b, h, s, t)

    def dense(x):
        bias = spread(x["bias"]) if "bias" in x else None
        more = {n: v for n, v in options.items() if n != "dropout_p"}
        keep = dropout_factors(dropout_seed(p, x["q"]), p, h, range(b), s, t)
        distance = distances(s, t, x["q"].device)
        return Dense(**(x | {"bias": bias}), distance=distance, keep=keep, **more)

    def call(**leaves):
        return ops.attention(**leaves, **options, return_lse=True)

    return attention_call(leaves, call, dense, spread)


def draw(r: Random, isa: str) -> Case:
    hkv, groups = r.choice([1, 1, 2, 3, 8]), r.choice([1, 1, 2, 3, 4, 8, 10])
    d, dv = size(r, 160, 1), size(r, 160, 1)
    b = r.choice([1, 1, 2, 3])
    work = 4e6 if isa in SLOW else 1e8
    while True:
        s, t = r.choice([1, 2, size(r, 300), size(r, 300)]), size(r, 1300)
        if b * hkv * groups * s * t * (t + d + dv) <= work:
            break
    options = drop_unset(
        causal=r.random() < 0.5,
        window=choice_or_none(r, 1, 7, 64, 200),
        softcap=choice_or_none(r, 3.0, 20.0),
        bias=choice_or_none(r, "full", "keys", "rows"),
        sinks=r.random() < 0.3,
        alibi=r.random() < 0.3,
        dropout_p=choice_or_none(r, 0.2),
        scale=choice_or_none(r, 0.05, -0.3),
    )
    return {"shape": [b, hkv * groups, hkv, s, t, d, dv], "options": options}


def case(*shape: int, peaked=False, hidden=False, infinite_sink=False, offset=None, **options):
    """shape: (B, H, Hkv, S, T, D, Dv)"""
    values = drop_unset(peaked=peaked, hidden=hidden, infinite_sink=infinite_sink, offset=offset)
    return {"shape": list(shape), "options": options, **values}


def far_apart(shape: tuple[int, ...], step: int, dtype: torch.dtype) -> Tensor:
    """Random rows `step` elements apart along the first dimension; only the rows occupy memory."""
    size = ((shape[0] - 1) * step + math.prod(shape[1:])) * dtype.itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    inner = torch.empty(shape[1:]).stride()
    t = torch.frombuffer(memory, dtype=dtype).as_strided(shape, (step, *inner))
    return t.copy_((torch.randn(shape) * (40 if dtype == torch.int8 else 1)).to(dtype))


SCORES = {"softcap": 9.0, "alibi": True, "sinks": True}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window, softcap": {"window": 19, "softcap": 3.0},
    "everything": {"causal": True, "scale": -0.3, "bias": "full", "dropout_p": 0.2, **SCORES},
    "bias of keys, dropout": {"bias": "keys", "dropout_p": 0.4},
    "bias of rows, sinks, window": {"bias": "rows", "sinks": True, "window": 4, "causal": True},
}
NO_BIAS = {"causal": True, "scale": -0.3, "dropout_p": 0.2, **SCORES}
DECODE = {"causal": True, "window": 600, "scale": -0.3, "bias": "keys", **SCORES}
EVERYTHING = OPTIONS["everything"]
CPU, TRITON = ("cpu",), ("triton",)

OP = Op(
    build,
    draw,
    ("cpu", "triton"),
    rows={
        # blocks of 96 queries and 256 keys, of 128 and 128 backward; widths that are no vectors
        **{
            f"blocks, {name}": Row(case(1, 2, 1, 130, 300, 40, 24, **options), on=CPU)
            for name, options in OPTIONS.items()
        },
        # several tiles of rows and keys; widths that are not a power of two
        **{
            f"tiles, {name}": Row(case(1, 2, 1, 37, 70, 40, 24, **options), on=TRITON)
            for name, options in OPTIONS.items()
        },
        # whole tiles before the window and after the diagonal, and unmasked ones between them
        **{
            f"tiles beyond the window, {s} queries": Row(
                case(1, 1, 1, s, t, 16, 16, window=150, causal=True), on=TRITON
            )
            for s, t in ((100, 260), (260, 100))
        },
        "whole vectors": Row(case(2, 4, 2, 9, 53, 64, 64, **EVERYTHING), on=CPU, bits=True),
        "whole vectors, causal": Row(case(2, 4, 4, 40, 20, 64, 64, causal=True), on=CPU, bits=True),
        "whole widths": Row(case(2, 2, 1, 9, 20, 16, 16, **EVERYTHING), on=TRITON, bits=True),
        "width 1": Row(case(1, 2, 2, 100, 100, 1, 7, window=19, softcap=3.0), on=CPU),
        # causal: rows that see nothing
        **{
            f"more queries than keys, {name}": Row(case(2, 3, 3, 5, 3, 33, 16, **OPTIONS[name]))
            for name in ("everything", "bias of rows, sinks, window")
        },
        "more queries than keys": Row(case(1, 2, 2, 6, 2, 8, 8, causal=True)),
        "rows that a bias hides": Row(case(1, 2, 1, 6, 70, 8, 8, hidden=True, bias="st")),
        "rows that a bias hides, a sink": Row(
            case(1, 2, 1, 6, 70, 8, 8, hidden=True, bias="st", sinks=True)
        ),
        "a sink of -inf": Row(
            case(1, 2, 2, 6, 4, 16, 16, sinks=True, infinite_sink=True, causal=True)
        ),
        # a row of one sequence against chunks of 512 keys
        "decode": Row(case(1, 6, 2, 1, 700, 64, 48), on=CPU, bits=True),
        "decode, options": Row(case(1, 6, 2, 1, 1300, 64, 48, **DECODE), on=CPU),
        "decode, many heads": Row(case(1, 10, 1, 1, 40, 80, 80), on=CPU),
        "decode, wide": Row(case(1, 2, 1, 2, 600, 256, 256, window=19, softcap=3.0), on=CPU),
        # heads that share a key head in a tile
        "few rows": Row(case(1, 6, 2, 1, 40, 24, 48, **EVERYTHING), on=TRITON),
        "few rows, no dropout": Row(case(1, 6, 2, 2, 70, 24, 48, **DECODE), on=TRITON),
        "one token": Row(case(1, 3, 1, 1, 1, 80, 80)),
        # a backward of its own without a bias
        "8 queries and keys": Row(case(2, 4, 2, 8, 8, 256, 24, **NO_BIAS), on=CPU),
        "7 queries, 8 keys": Row(
            case(3, 2, 2, 7, 8, 40, 40, window=4, sinks=True), on=CPU, bits=True
        ),
        "peaked": Row(case(1, 2, 1, 40, 40, 16, 16, peaked=True)),
        **{
            f"peaked, scores near {offset:.0f}": Row(
                case(1, 2, 1, 40, 40, 16, 16, peaked=True, bias="st", offset=offset)
            )
            for offset in (60.0, -60.0)
        },
        # the bias's gradient sums over what it is broadcast to
        **{
            f"bias over {dims}": Row(
                case(2, 2, 1, 9, 40, 16, 16, causal=True, window=30, bias=dims), on=TRITON
            )
            for dims in ("bh", "hs", "bt", "st")
        },
        # added to the index of a row, such a window exceeds 2^31
        "a window of every key": Row(
            case(1, 2, 2, 20, 70, 16, 16, causal=True, window=2**31 - 1)
        ),
        "no sequences": Row(case(0, 2, 2, 3, 4, 8, 8)),
        "no queries": Row(case(2, 2, 2, 0, 4, 8, 8, bias="ht")),
        "no keys": Row(case(2, 2, 2, 3, 0, 8, 8, sinks=True)),
        "no keys, one query": Row(case(2, 2, 2, 1, 0, 8, 8)),
        # fewer than 8 key heads: spans of 512 keys backward
        "spans": Row(case(1, 2, 1, 40, 1100, 16, 16, causal=True), on=CPU),
        "split": Row(case(2, 4, 2, 200, 300, 64, 40, causal=True), on=CPU, split=True),
        "split spans": Row(case(1, 2, 1, 150, 1300, 32, 32, bias="full"), on=CPU, split=True),
        "split heads": Row(case(3, 6, 3, 140, 140, 33, 33, bias="keys"), on=CPU, split=True),
        "split options": Row(
            case(
                2, 4, 4, 130, 260, 48, 48, causal=True, window=300, bias="rows", dropout_p=0.2,
                **SCORES,
            ),
            on=CPU, split=True,
        ),
        "split decode": Row(case(2, 6, 3, 1, 2100, 64, 64, sinks=True), on=CPU, split=True),
    },
    small={
        "everything": case(2, 2, 1, 3, 4, 2, 3, **EVERYTHING),
        "bias of rows, sinks, window": case(
            1, 2, 1, 3, 6, 2, 3, **OPTIONS["bias of rows, sinks, window"]
        ),
        "plain": case(1, 2, 1, 3, 3, 2, 2),
    },
    batches={
        # B differs from Hkv: equal sizes share a symbol
        "options": [
            case(b, 4, 2, s, s, 16, 16, causal=True, window=6, softcap=5.0)
            for b, s in ((3, 8), (5, 9), (6, 17))
        ],
    },
)  # fmt: skip
