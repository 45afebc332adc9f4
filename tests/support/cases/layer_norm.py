"""layer_norm as cases."""

from random import Random

import torch
import torch.nn.functional as F

from cases.base import Case, Op, OpCall, Row, name_parameters, random_shape
from cases.rms_norm import wide_rows
from fastlm import ops


def build(case: Case, dtype: torch.dtype) -> OpCall:
    shape, eps = case["shape"], case["options"]["eps"]
    x = (torch.randn(shape) + case["offset"]).to(dtype) * case["spread"]
    kind = torch.promote_types(dtype, torch.float32) if case["wide"] else dtype
    leaves = {"x": x}
    for name in case["parameters"]:
        leaves[name] = torch.randn(shape[-1]).to(kind)
    if case["residual"]:
        leaves["residual"] = torch.randn(shape).to(dtype)

    def function(*tensors):
        return ops.layer_norm(**dict(zip(leaves, tensors)), eps=eps)

    def plain(*tensors):
        arguments = dict(zip(leaves, tensors))
        h = arguments["x"] + arguments["residual"] if case["residual"] else arguments["x"]
        h = h + (h.to(dtype).to(h.dtype) - h).detach()  # the sum is rounded by definition
        # torch keeps rstd in float16, which has no 1 / sqrt(1e-12)
        wide = torch.promote_types(h.dtype, torch.float32)
        weight, bias = (
            arguments[p].to(wide) if p in arguments else None for p in ("weight", "bias")
        )
        y = F.layer_norm(h.to(wide), h.shape[-1:], weight, bias, eps).to(h.dtype)
        return (y, h) if case["residual"] else y

    def terms(*tensors):
        """y is a sum, the gradients are differences and sums."""
        arguments, (dy, *dh) = dict(zip(leaves, tensors)), tensors[len(leaves) :]
        h = arguments["x"]
        if case["residual"]:
            h = (h + arguments["residual"]).to(dtype).double()
        z = h - h.mean(-1, keepdim=True)
        rstd = (z.square().mean(-1, keepdim=True) + eps).rsqrt()
        z = (z * rstd).abs()
        w = arguments["weight"].abs() if "weight" in arguments else 1.0
        g = dy.abs() * w
        dx = rstd * (g + g.mean(-1, keepdim=True) + z * (g * z).mean(-1, keepdim=True))
        dx = dx + sum(t.abs() for t in dh)
        rows = {"dweight": dy.abs() * (z + 1), "dbias": dy.abs()}
        rows = {name: t.reshape(-1, shape[-1]).sum(0) for name, t in rows.items()}
        # the mean is as far off as the mean of |z| makes it
        y = (z + z.mean(-1, keepdim=True)) * w + (
            arguments["bias"].abs() if "bias" in arguments else 0.0
        )
        return {"y": y, "dx": dx, "dresidual": dx, **rows}

    outputs = ("y", "h") if case["residual"] else ("y",)
    return OpCall(name_parameters(function, [*leaves]), [*leaves.values()], plain, terms, outputs)


def draw(r: Random, isa: str) -> Case:
    fields: Case = {
        "shape": random_shape(r, isa, 1 << 12, 1),
        "parameters": r.choice([[], ["weight"], ["bias"], ["weight", "bias"], ["weight", "bias"]]),
        "residual": r.random() < 0.5,
        "wide": r.random() < 0.5,
        "spread": r.choice([0.01, 1.0, 100.0]),
        "offset": r.choice([0.0, 0.0, 30.0]),  # in spreads
        "options": {"eps": r.choice([1e-5, 1e-12])},
    }
    if fields["shape"][-1] == 2:  # z is 1 and -1, so dx is 0 unless eps counts
        fields["options"]["eps"] = fields["spread"] ** 2
    return fields


def case(*shape: int, parameters="weight bias", residual=False, wide=False, spread=1.0, offset=0.0):
    return {
        "shape": list(shape), "parameters": parameters.split(), "residual": residual, "wide": wide,
        "spread": spread, "offset": offset, "options": {"eps": 1e-5},
    }  # fmt: skip


OP = Op(
    build,
    draw,
    kernels=("cpu", "triton"),
    rows={
        "ragged": Row(case(252, 507), on=("cpu",)),
        "ragged, residual": Row(case(252, 507, residual=True), on=("cpu",)),
        "one row": Row(case(1, 123, residual=True), bits=True),
        "one element": Row(case(2, 1)),
        "three dimensions": Row(case(3, 5, 64, residual=True), bits=True),
        "more rows than programs": Row(case(70, 17, wide=True)),
        "whole vectors": Row(case(4, 512, residual=True), bits=True),
        "no rows": Row(case(0, 8, residual=True)),
        "weight alone": Row(case(5, 123, parameters="weight", residual=True)),
        "bias alone": Row(case(5, 123, parameters="bias")),
        "no parameters": Row(case(5, 123, parameters="", residual=True)),
        "small": Row(case(6, 200, spread=1e-4)),
        "large": Row(case(6, 200, spread=1e2, residual=True)),
        "large mean": Row(case(6, 200, offset=100.0)),
        "mean of 10,000": Row(case(6, 200, offset=1e4)),  # rows of one number in float16
        "several tiles": Row(case(18, 1100, residual=True), on=("triton",)),
        "wider than registers": Row(case(2, 8200, residual=True), on=("triton",), shipped=True),
        "split": Row(case(401, 257, residual=True, wide=True), on=("cpu",), split=True),
    },
    small={
        "alone": case(2, 3, 7),
        "residual": case(5, 7, residual=True),
        "vector": case(7, parameters="weight"),
        "bias": case(5, 7, parameters="bias", residual=True),
        "no parameters": case(5, 7, parameters=""),
    },
    batches={"rows": [case(n, 64, residual=True) for n in (4, 9, 17)]},
    settings={"triton": {"wide rows": wide_rows("layer_norm")}},
)
