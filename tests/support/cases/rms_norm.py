"""rms_norm as cases."""

import importlib
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from cases.base import Case, Op, OpCall, Row, name_parameters, random_shape
from fastlm import ops


def build(case: Case, dtype: torch.dtype) -> OpCall:
    shape, options = case["shape"], case["options"]
    eps, offset = options["eps"], options["offset"]
    x = torch.randn(shape).to(dtype) * case["spread"]
    leaves = [x]
    if case["weight"]:
        wide = torch.promote_types(dtype, torch.float32)
        leaves.append(torch.randn(shape[-1]).to(wide if case["weight"] == "wide" else dtype))
    if case["residual"]:
        leaves.append(torch.randn(shape).to(dtype))

    def parted(tensors):
        """x, weight, residual and what follows."""
        x, *rest = tensors
        weight = rest.pop(0) if case["weight"] else None
        return x, weight, rest.pop(0) if case["residual"] else None, rest

    def function(*tensors):
        x, weight, residual, _ = parted(tensors)
        return ops.rms_norm(x, weight, residual=residual, **options)

    def plain(*tensors):
        x, weight, residual, _ = parted(tensors)
        h = x if residual is None else x + residual
        h = h + (h.to(dtype).to(h.dtype) - h).detach()  # the sum is rounded by definition
        wide = torch.promote_types(h.dtype, torch.float32)
        factor = None if weight is None else offset + weight.to(wide)
        y = F.rms_norm(h.to(wide), h.shape[-1:], factor, eps).to(h.dtype)
        return y if residual is None else (y, h)

    def terms(*tensors):
        """dx and dweight are differences and sums."""
        x, weight, residual, upstream = parted(tensors)
        h = x if residual is None else (x + residual).to(dtype).double()
        if not upstream:
            return {}
        dy, *dh = upstream
        rstd = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
        g, n = (dy * (1 if weight is None else offset + weight)).abs(), (h * rstd).abs()
        dx = rstd * (g + n * (g * n).mean(-1, keepdim=True)) + sum(t.abs() for t in dh)
        dweight = (dy.abs() * n).reshape(-1, shape[-1]).sum(0)
        return {"dx": dx, "dresidual": dx, "dweight": dweight}

    names = ["x", *["weight"] * bool(case["weight"]), *["residual"] * case["residual"]]
    return OpCall(
        name_parameters(function, names),
        leaves,
        plain,
        terms,
        ("y", "h") if case["residual"] else ("y",),
    )


def draw(r: Random, isa: str) -> Case:
    weight = r.choice(["wide", "like x", None])
    offset = r.choice([0.0, 1.0, -0.5]) if weight else 0.0
    return {
        "shape": random_shape(r, isa, 10000 if isa == "simt" else 1 << 12, 1),
        "residual": r.random() < 0.5,
        "weight": weight,
        "spread": r.choice([0.01, 1.0, 100.0]),
        "options": {"eps": r.choice([1e-6, 1e-5]), "offset": offset},
    }


def case(*shape: int, residual=False, weight="like x", spread=1.0, offset=0.0, eps=1e-6) -> Case:
    options = {"eps": eps, "offset": offset}
    return {
        "shape": list(shape), "residual": residual, "weight": weight, "spread": spread,
        "options": options,
    }  # fmt: skip


def wide_rows(norm: str) -> Callable[[Any], None]:
    """Small rows also use the path for wide ones, in blocks that do not divide them."""

    def change(patch) -> None:
        module = importlib.import_module(f"fastlm.kernels.{norm}")
        patch.setattr(module, "_MAX_TILE_WIDTH", 0)
        patch.setattr(module, "_WIDE", module.Config({"BLOCK": 128}))
        patch.setattr(module, "_COLUMNS", module.Config({"BLOCK": 128}))

    return change


OP = Op(
    build,
    draw,
    rows={
        "ragged": Row(case(252, 507), on=("cpu",)),
        "ragged, residual": Row(case(252, 507, residual=True, offset=1.0), on=("cpu",)),
        "one row": Row(case(1, 123, residual=True), bits=True),
        "one element": Row(case(2, 1)),
        "no weight": Row(case(9, 107, weight=None), bits=True),
        "no weight, residual": Row(case(4, 512, weight=None, residual=True)),
        "three dimensions": Row(case(3, 5, 64, residual=True, offset=1.0), bits=True),
        "more rows than programs": Row(case(70, 17, weight="wide"), on=("cpu", "triton")),
        "whole vectors": Row(case(4, 512, residual=True), bits=True),
        "no rows": Row(case(0, 8, residual=True)),
        "small": Row(case(6, 200, spread=1e-4)),
        "large": Row(case(6, 200, spread=1e2, residual=True)),
        "several tiles": Row(case(18, 700, residual=True, offset=1.0), on=("triton",)),
        "wider than registers": Row(case(2, 8200, residual=True), on=("triton",), shipped=True),
        "two vectors a thread": Row(case(1, 2056, residual=True, offset=1.0), on=("cuda",)),
        "four vectors a thread": Row(case(1, 4104), on=("cuda",)),
        "four elements a thread": Row(case(1, 1025, residual=True), on=("cuda",)),
        "wide rows": Row(case(2, 9001, offset=1.0), on=("cuda",), bits=True),
        "split": Row(
            case(401, 257, residual=True, weight="wide", offset=1.0), on=("cpu",), split=True
        ),
    },
    small={
        "alone": case(2, 3, 7, offset=1.0),
        "residual": case(5, 7, residual=True),
        "vector": case(7, residual=True),
        "no weight": case(5, 7, weight=None, residual=True),
    },
    batches={"rows": [case(n, 64, residual=True) for n in (4, 9, 17)]},
    forward_only=("cuda",),
    any_strides=("cpu", "triton"),
    settings={"triton": {"wide rows": wide_rows("rms_norm")}},
)
