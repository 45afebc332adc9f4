"""quantized_linear as cases. The dequantized weight is also compared."""

from itertools import count
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from cases.base import DTYPES, SLOW, Case, Op, OpCall, Row, Terms, name_parameters, size
from fastlm import QuantizedWeight, backend, ops, reference


def expanded(t: Tensor, group_size: int, k: int) -> Tensor:
    """(N, groups) -> (N, K)."""
    return t.repeat_interleave(group_size, -1)[..., :k]


def build(case: Case, dtype: torch.dtype) -> OpCall:
    m, n, k = case["shape"]
    bits, act_bits = case["bits"], case["act_bits"]
    scale_dtype = DTYPES[case["scale_dtype"]]
    q = ops.quantize_weight(
        torch.randn(n, k),
        bits,
        group_size=case["group_size"],
        symmetric=case["symmetric"],
        scale_dtype=scale_dtype,
    )
    group_size = q.group_size
    leaves = {"x": torch.randn(m, k).to(dtype), "qdata": q.qdata, "scales": q.scales}
    if q.zeros is not None:
        leaves["zeros"] = q.zeros.to(DTYPES[case.get("zeros_dtype", case["scale_dtype"])])
    if case["bias"]:
        leaves["bias"] = torch.randn(n).to(scale_dtype if dtype != torch.float64 else dtype)

    def split_leaves(tensors):
        """Return x, qdata, scales, zeros, bias and the rest."""
        arguments = dict(zip(leaves, tensors))
        rest = tensors[len(leaves) :]
        return *tensors[:3], arguments.get("zeros"), arguments.get("bias"), rest

    def function(*tensors):
        x, *codes, bias, _ = split_leaves(tensors)
        codes = (t if t is None else t.contiguous() for t in codes)
        weight = QuantizedWeight(*codes, bits, group_size, (n, k))
        y = ops.quantized_linear(x, weight, bias, act_bits=act_bits)
        return y, weight.dequantize(x.dtype)

    def takes_bf16_tiles():
        """On AMX many rows of small groups are rounded to bf16 instead of 8 bits."""
        on_amx = backend.cpu_isa() in ("amx", "amx_emulated")
        forced = backend.forced_backend() not in (None, "cpu")
        many_rows = on_amx and m >= backend.cpu_extension.BF16_TILE_ROWS
        return many_rows and not forced and act_bits == 8 and group_size < 128

    def rounded(x):
        """The rounding of x is part of the definition."""
        if takes_bf16_tiles():
            return x.detach().bfloat16().double()
        q, scale = reference.round_rows(x.detach().float(), group_size)
        return q.double() * scale.double()

    def plain(*tensors):
        x, qdata, scales, zeros, bias, _ = split_leaves(tensors)
        kind = torch.promote_types(x.dtype, torch.float32) if act_bits == 8 else x.dtype
        if takes_bf16_tiles() and x.dtype != torch.float64:
            kind = torch.bfloat16
        w = reference.dequantize(qdata, scales, zeros, bits, group_size, k, kind)
        wide = x.to(kind)
        if act_bits == 8:
            wide = rounded(x).to(kind) + (wide - wide.detach())
        y = F.linear(wide, w, None if bias is None else bias.to(kind))
        return y.to(x.dtype), w.detach().to(x.dtype)

    def terms(*tensors):
        """Sums of K or N products. A weight of 16-bit activations is rounded to their dtype; its
        code and its offset are multiplied apart, or added.
        """
        x, qdata, scales, zeros, bias, upstream = split_leaves(tensors)
        w = reference.dequantize(qdata, scales, zeros, bits, group_size, k, torch.float64)
        size = w.abs()
        if zeros is not None:
            zero = expanded(zeros, group_size, k)
            size = (w - zero).abs() + zero.abs()

        def product(a, w, size):
            rounded = None if dtype == torch.float32 else (a.square() @ w.square()).sqrt()
            return Terms(a.abs() @ size, rounded=rounded)

        y = product(rounded(x) if act_bits == 8 else x, w.T, size.T)
        y = Terms(
            y.scale + (0.0 if bias is None else bias.abs()),
            rounded=None if act_bits == 8 else y.rounded,
        )
        sizes = {"y": y, "w": Terms(size)}
        if upstream:
            sizes |= {"dx": product(upstream[0], w, size), "dbias": upstream[0].abs().sum(0)}
        return sizes

    constant = tuple(i for i, name in enumerate(leaves) if name in ("scales", "zeros"))
    return OpCall(
        name_parameters(function, [*leaves]),
        [*leaves.values()],
        plain,
        terms,
        ("y", "w"),
        constant=constant,
    )


def draw(r: Random, isa: str) -> Case:
    work = 2e5 if isa == "simt" else 2e6 if isa in SLOW else 2e7
    while True:
        m, n, k = r.choice([0, 1, 1, 2, 5, size(r, 600)]), size(r, 700, 1), size(r, 3000, 1)
        if m * n * k <= work:
            break
    return {
        "shape": [m, n, k],
        "bits": r.choice([4, 8]),
        "act_bits": r.choice([8, 16]),
        "group_size": r.choice([8, 16, 24, 32, 64, 128, 128, 256, -1]),
        "symmetric": r.random() < 0.6,
        "scale_dtype": r.choice(list(DTYPES)),
        "zeros_dtype": r.choice(list(DTYPES)),
        "bias": r.random() < 0.5,
    }


def case(
    *shape: int, bits=4, act_bits=16, group_size=16, symmetric=False, scale_dtype="bfloat16",
    bias=True,
) -> Case:  # fmt: skip
    return {
        "shape": list(shape), "bits": bits, "act_bits": act_bits, "group_size": group_size,
        "symmetric": symmetric, "scale_dtype": scale_dtype, "bias": bias,
    }  # fmt: skip


FORMATS = [(bits, act_bits) for bits in (4, 8) for act_bits in (16, 8)]
_EXTRAS = [(dtype, bias) for bias in (True, False) for dtype in DTYPES]
_calls = count()


def each_format(
    name: str, *shape: int, group_size: int, symmetric=False, which=FORMATS, **row
) -> dict[str, Row]:
    """A row of each format, with scales of each dtype, with and without a bias."""
    rows, first = {}, next(_calls)
    for i, (bits, act_bits) in enumerate(which):
        scale_dtype, bias = _EXTRAS[(first + i) % len(_EXTRAS)]
        options = {"group_size": group_size, "scale_dtype": scale_dtype, "bias": bias}
        options |= {"bits": bits, "act_bits": act_bits, "symmetric": symmetric}
        rows[f"{name}, w{bits}a{act_bits}"] = Row(case(*shape, **options), **row)
    return rows


ONE, BOTH = ("cpu",), ("triton", "cuda")
OP = Op(
    build,
    draw,
    multiplies_int8=True,
    rows={
        **each_format("one row", 1, 20, 64, group_size=16),
        **each_format("three rows", 3, 37, 507, group_size=40, which=FORMATS[:2], bits=True),
        **each_format("three rows", 3, 37, 507, group_size=40, which=FORMATS[2:]),
        **each_format("ragged", 5, 64, 123, group_size=32, symmetric=True, which=FORMATS[:2]),
        **each_format(
            "ragged", 5, 64, 123, group_size=32, symmetric=True, which=FORMATS[2:], bits=True
        ),
        **each_format("one column", 17, 33, 1, group_size=-1),
        **each_format("several tiles", 34, 30, 252, group_size=128, symmetric=True),
        "no rows": Row(case(0, 24, 48)),
        "no outputs": Row(case(3, 0, 48)),
        **each_format("one output", 2, 1, 1030, group_size=520, symmetric=True, on=ONE),
        **each_format("one group", 1, 20, 507, group_size=-1, on=ONE),
        **each_format("groups across chunks", 9, 70, 612, group_size=40, on=ONE),
        **each_format("two blocks", 40, 130, 1160, group_size=128, symmetric=True, on=ONE),
        **each_format("runs", 14, 37, 1630, group_size=-1, on=ONE),
        **each_format("rows of each thread", 300, 40, 1100, group_size=64, on=ONE),
        **each_format("wide groups", 300, 40, 1100, group_size=128, which=FORMATS[1::2], on=ONE),
        # without a workspace, and with one for most formats
        **each_format("long row", 1, 3, 8192, group_size=8, on=ONE),
        **each_format("longer row", 1, 3, 13500, group_size=8, on=ONE),
        **{
            f"split {m}, w{bits}a{act_bits}": Row(
                case(m, 517, 648, bits=bits, act_bits=act_bits, group_size=64), on=ONE, split=True
            )
            for bits, act_bits in FORMATS
            for m in (1, 5, 150)
        },
        **each_format("two rows", 2, 9, 2080, group_size=520, symmetric=True, on=BOTH),
        **each_format("four rows", 4, 5, 123, group_size=8, on=BOTH),
        **each_format("parts of K", 9, 20, 1160, group_size=-1, on=BOTH),
        **each_format("runs of a group", 9, 20, 1160, group_size=520, on=BOTH),
        **each_format("70 rows", 70, 30, 136, group_size=32, on=BOTH),
        **each_format("130 rows", 130, 5, 100, group_size=-1, on=("triton",)),
        **each_format("chunks of a warp", 1, 9, 4128, group_size=128, on=("cuda",)),
    },
    small={  # of 16-bit activations: a derivative of rounded ones is not that of their values
        "w4": case(2, 5, 12, group_size=8),
        "w8": case(3, 6, 16, bits=8, group_size=8, symmetric=True, bias=False),
    },
    batches={
        "rows": [case(m, 32, 64, group_size=-1, symmetric=True) for m in (4, 9, 17)],
        "int8": [case(m, 32, 64, act_bits=8) for m in (4, 9, 17)],
    },
    forward_only=("cuda",),
    any_strides=("cpu", "triton"),
)
