"""rope as cases."""

import math
from random import Random

import torch
from torch import Tensor

from cases.base import DTYPES, Case, Op, OpCall, Row, size
from fastlm import ops


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    if interleaved:
        rotated = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        rotated = torch.cat((-part[..., width // 2 :], part[..., : width // 2]), -1)
    return torch.cat((part * cos + rotated * sin, rest), -1)


def naive(q, k, cos, sin, interleaved=False):
    """Hugging Face's formula, with rounding after every op as in eager torch."""
    cos, sin = (t.to(q.dtype).unsqueeze(-3) for t in (cos, sin))
    return turned(q, cos, sin, interleaved), turned(k, cos, sin, interleaved)


def tables(length, width, *, interleaved=False, batch=None):
    """cos and sin as computed by a Hugging Face model's rotary embedding."""
    position = torch.arange(length, dtype=torch.float32).expand(batch or 1, -1)
    if batch:
        position = position + 100 * torch.arange(batch)[:, None]
    angles = position[..., None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return (angles.cos(), angles.sin()) if batch else (angles.cos()[0], angles.sin()[0])


def table_of_axes(tables: Tensor, sections: list[int], interleaved: bool) -> Tensor:
    """(A, B, S, R) -> (B, S, R): each angle from its section's axis, by Qwen2-VL's formula."""
    axis = torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections))
    axis = (axis.repeat_interleave(2) if interleaved else axis.repeat(2)).to(tables.device)
    return tables.gather(0, axis.expand(1, *tables.shape[1:]))[0]


def build(case: Case, dtype: torch.dtype) -> OpCall:
    """The tables are random, with every angle once: only the elementwise formula yields these
    results.
    """
    (b, h, hkv, s), (d, width), interleaved = case["shape"], case["widths"], case["interleaved"]
    q, k = torch.randn(b, h, s, d).to(dtype), torch.randn(b, hkv, s, d).to(dtype)
    sections = case.get("sections")
    batch = (len(sections), b) if sections else () if case["tables"] == 2 else (b,)
    kind = torch.float64 if dtype == torch.float64 else DTYPES[case["table_dtype"]]
    cos, sin = torch.randn(2, *batch, s, width).to(kind).unbind(0)

    def function(q, k, cos, sin):
        return ops.rope(
            q, k, cos, sin, interleaved=interleaved, rotary_dim=width, mrope_section=sections
        )

    def plain(q, k, cos, sin):
        if sections:
            cos, sin = (table_of_axes(t, sections, interleaved) for t in (cos, sin))
        return naive(q, k, cos, sin, interleaved)

    def partner(t):
        """The other element of each pair."""
        if interleaved:
            return t.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return t.roll(width // 2, -1)

    def terms(q, k, cos, sin, *upstream):
        if sections:
            cos, sin = (table_of_axes(t, sections, interleaved) for t in (cos, sin))
        cos, sin = cos.abs().unsqueeze(-3), sin.abs().unsqueeze(-3)

        def both(x, sin):
            part, rest = x.abs().split((width, d - width), -1)
            return torch.cat((part * cos + partner(part) * sin, rest), -1)

        sizes = {"q": both(q, sin), "k": both(k, sin)}
        if upstream:  # the way back takes the partner's sine
            sizes |= {name: both(t, partner(sin)) for name, t in zip(("dq", "dk"), upstream)}
        return sizes

    return OpCall(function, [q, k, cos, sin], plain, terms, ("q", "k"), constant=(2, 3))


def draw(r: Random, isa: str) -> Case:
    while True:
        width = size(r, 200, 1)
        shape = [r.choice([0, 1, 2, 3]), r.choice([1, 2, 5, 32]), r.choice([1, 2]), size(r, 100)]
        if isa != "simt" or math.prod(shape) * width <= 10000:
            break
    turned = r.choice([width // 2 * 2, size(r, width) // 2 * 2])
    cuts = sorted(r.randint(0, turned // 2) for _ in range(2))
    return {
        "shape": shape,
        "widths": [width, turned],
        "interleaved": r.random() < 0.5,
        "tables": r.choice([2, 3, 3]),
        "table_dtype": r.choice(list(DTYPES)),
        "sections": r.choice([None, None, [cuts[0], cuts[1] - cuts[0], turned // 2 - cuts[1]]]),
    }


def case(
    *shape: int, widths, interleaved=False, tables=2, table_dtype="float32", sections=None
) -> Case:
    return {
        "shape": list(shape), "widths": list(widths), "interleaved": interleaved, "tables": tables,
        "table_dtype": table_dtype, "sections": sections,
    }  # fmt: skip


def several_heads_a_program(patch) -> None:
    """Several heads per program, in tiles that do not divide them, as for many positions."""
    from fastlm.kernels import rope as module

    patch.setattr(module, "multiprocessors", lambda device: 0)
    patch.setattr(module, "_PAIRS", 64)


def several_heads_a_thread(patch) -> None:
    """Several heads per thread, in groups that do not divide them, as for many positions."""
    from fastlm.cuda import rope as module

    patch.setattr(module, "_POSITIONS", 0)
    patch.setattr(module, "_HEADS", 3)


def both_layouts(name: str, row: Row) -> dict[str, Row]:
    return {
        name: row,
        f"{name}, interleaved": row._replace(case=row.case | {"interleaved": True}),
    }


OP = Op(
    build,
    draw,
    rows={
        **both_layouts("whole heads", Row(case(2, 4, 2, 9, widths=(64, 64), tables=3))),
        **both_layouts("part of a head", Row(case(2, 5, 1, 5, widths=(80, 32)), bits=True)),
        **both_layouts("ragged", Row(case(2, 1, 1, 3, widths=(66, 22), tables=3))),
        "tables in bfloat16": Row(
            case(2, 3, 1, 6, widths=(40, 24), table_dtype="bfloat16"), bits=True
        ),
        "tables in float16": Row(case(
            2, 3, 1, 6, widths=(40, 24), interleaved=True, tables=3, table_dtype="float16"
        )),
        **both_layouts(
            "three axes",
            Row(case(2, 4, 2, 7, widths=(40, 32), sections=[4, 6, 6]), on=("cpu", "triton")),
        ),
        # the pairs fill less than a 16-bit vector
        **both_layouts("few pairs", Row(case(1, 2, 2, 2, widths=(32, 8)), on=("cuda",))),
        "ragged heads": Row(case(1, 3, 3, 17, widths=(20, 20)), on=("cpu",)),
        "wide heads": Row(case(1, 3, 3, 17, widths=(128, 128)), on=("cpu", "cuda")),
        "one pair": Row(case(1, 2, 1, 1, widths=(2, 2))),
        "no rotation": Row(case(1, 2, 1, 4, widths=(9, 0))),
        "no positions": Row(case(2, 3, 1, 0, widths=(8, 8))),
        "no sequences": Row(case(0, 3, 1, 4, widths=(8, 8), tables=3)),
        "split": Row(case(2, 8, 2, 150, widths=(64, 64), tables=3), on=("cpu",), split=True),
        "split, interleaved": Row(
            case(2, 8, 2, 150, widths=(66, 32), interleaved=True, table_dtype="bfloat16"),
            on=("cpu",), split=True,
        ),
    },
    small={
        "halves": case(2, 3, 1, 5, widths=(10, 4)),
        "interleaved": case(1, 3, 2, 3, widths=(6, 6), interleaved=True, tables=3),
    },
    # all sizes differ because of duck sizing
    batches={
        name: [
            case(b, 4, 2, s, widths=(16, 12), sections=of) for b, s in ((5, 11), (6, 13), (7, 17))
        ]
        for name, of in {"sequences": None, "three axes": [1, 3, 2]}.items()
    },
    settings={
        "triton": {"several heads": several_heads_a_program},
        "cuda": {"several heads": several_heads_a_thread},
    },
)  # fmt: skip
