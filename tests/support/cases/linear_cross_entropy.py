"""linear_cross_entropy as cases."""

import contextlib
from collections.abc import Iterator
from random import Random

import pytest
import torch
import torch.nn.functional as F

from cases import losses
from cases.base import SLOW, Case, Op, OpCall, Row, size
from fastlm import ops


@contextlib.contextmanager
def gradient_method(name: str) -> Iterator[None]:
    """Force the method of the gradients, which the op chooses by the number of rows and the size of
    its products: "forward", "recomputed" or "small" (by the definition).
    """
    from fastlm.ops.linear_cross_entropy import linear_cross_entropy

    names = linear_cross_entropy.__globals__
    few_rows, max_small_product = {
        "forward": (0, 0), "recomputed": (64, 0), "small": (64, names["_MAX_SMALL_PRODUCT"])
    }[name]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(names, "_FEW_ROWS", few_rows)
        patch.setitem(names, "_MAX_SMALL_PRODUCT", max_small_product)
        yield


def build(case: Case, dtype: torch.dtype) -> OpCall:
    rows, width, classes = case["shape"]
    x, w, bias = losses.tensors(case, dtype, width)
    target, weight, options = losses.targets(case, rows, classes)
    method = case.get("method") or ("small" if case.get("small") else "recomputed")

    def split(rest):
        """Return bias and class weights, either of which may be missing, and the rest."""
        rest = list(rest)
        bias = rest.pop(0) if case["bias"] else None
        return bias, rest.pop(0) if case["weight"] else None, rest

    def function(x, w, target, *rest):
        bias, weight, _ = split(rest)
        with gradient_method(method):
            return ops.linear_cross_entropy(
                x, w, target, linear_bias=bias, weight=weight, **options
            )

    def plain(x, w, target, *rest):
        bias, weight, _ = split(rest)
        return losses.definition(losses.product(x, w, bias), target, weight, **options)

    def terms(x, w, target, *rest):
        bias, weight, upstream = split(rest)
        size = losses.logit_size(x, w, bias)
        sizes, scale, float32 = losses.sizes(
            F.linear(x, w, bias), target, weight, upstream, size=size, **options
        )
        return sizes if scale is None else sizes | losses.product_sizes(x, w, scale, float32, dtype)

    names = ["x", "w", "target", *(["bias"] if bias else []), *(["weight"] if weight else [])]
    return OpCall(
        function,
        [x, w, target, *bias, *weight],
        plain,
        terms,
        ("loss", "lse") if options.get("return_lse") else ("loss",),
        names=tuple(names),
        constant=(len(names) - 1,) if weight else (),
        library=method == "small",
    )


def draw_shape(r: Random, isa: str) -> list[int]:
    while True:
        # not a single class: its gradient is 0, and consists only of terms that cancel
        shape = [size(r, 1200), size(r, 300, 1), size(r, 6000, 2)]
        if shape[0] * shape[1] * shape[2] <= (4e6 if isa in SLOW else 8e7):
            return shape


def draw(r: Random, isa: str) -> Case:
    shape = draw_shape(r, isa)
    loss = losses.draw(r, shape[2])
    return {"shape": shape, "bias": r.random() < 0.5, "small": r.random() < 0.3, **loss}


def case(*shape: int, bias=True, values="", method="forward", **loss) -> Case:
    return {
        "shape": list(shape), "bias": bias, "values": values, "method": method,
        **losses.case(**loss),
    }  # fmt: skip


def chunks_of_8_rows(patch) -> None:
    """The last chunk is ragged."""
    from fastlm.kernels import linear_cross_entropy as module

    patch.setattr(module, "_TILE", 8)


OPTIONS = {
    "mean": {},
    "sum, z-loss, weights": {"reduction": "sum", "z_loss": 1e-2, "weight": True},
    "rows": {"reduction": "none", "bias": False},
    "rows, smoothing, z-loss": {
        "reduction": "none", "label_smoothing": 0.1, "z_loss": 1e-2, "weight": True,
    },
    "smoothing, items": {"label_smoothing": 0.1, "num_items": 77},
    "smoothing, weights": {"label_smoothing": 0.1, "weight": True, "bias": False},
    "softcap, scale": {"softcap": 5.0, "logit_scale": 0.7, "weight": True},
    "softcap, scale, lse": {"softcap": 5.0, "logit_scale": 0.7, "return_lse": True},
    "softcap, smoothing": {"softcap": 5.0, "label_smoothing": 0.3, "reduction": "sum"},
}  # fmt: skip
HARD = ("peaked", "all negative", "common offset", "far above the first")

OP = Op(
    build,
    draw,
    kernels=("cpu", "triton"),
    rows={
        **{name: Row(case(29, 40, 123, **options)) for name, options in OPTIONS.items()},
        # the gradients are computed in the backward, the weight's in its own dtype
        "recomputed": Row(case(29, 40, 123, method="recomputed"), bits=True),
        "recomputed, smoothing": Row(
            case(33, 50, 300, method="recomputed", label_smoothing=0.2, reduction="sum"),
            on=("cpu",),
        ),
        "one row": Row(case(1, 50, 300, method="recomputed", ignored=0.0), on=("cpu",)),
        "one row, one feature, one class": Row(case(1, 1, 1, ignored=0.0)),
        "three classes": Row(case(2, 1, 3)),
        # more rows than a chunk is wide, two blocks of classes and one class
        "two blocks": Row(case(70, 64, 513, weight=True), on=("cpu",)),
        "two blocks, rows": Row(case(70, 64, 513, reduction="none"), on=("cpu",), bits=True),
        "ragged": Row(case(252, 507, 123), on=("cpu",)),
        "more rows than a chunk": Row(case(530, 40, 700, bias=False, ignored=0.0), on=("cpu",)),
        "large vocabulary": Row(case(5, 64, 5003, reduction="none"), on=("cpu",)),
        **{f"{v}, blocks": Row(case(40, 32, 700, values=v), on=("cpu",)) for v in HARD},
        **{
            f"{v}, rows": Row(case(40, 32, 700, values=v, reduction="none"), on=("cpu",))
            for v in HARD
        },
        "far above the first, smoothing": Row(
            case(40, 32, 700, values=HARD[3], label_smoothing=0.2), on=("cpu",)
        ),
        **{v: Row(case(12, 32, 100, values=v), on=("triton",)) for v in HARD[:3]},
        "small": Row(case(7, 40, 123, method="small", ignored=0.0), on=("cpu",)),
        "small, options": Row(
            case(7, 40, 123, method="small", ignored=0.0, **OPTIONS["rows, smoothing, z-loss"]),
            on=("cpu",),
        ),
        "no rows": Row(case(0, 8, 20, reduction="sum")),
        "every row ignored": Row(case(3, 8, 20, ignored=1.0, num_items=4)),
        **{
            f"split {name}": Row(
                case(*shape, ignored=0.3, spread=1.0, **options), ("cpu",), split=True
            )
            for name, shape, options in (
                ("forward", (151, 71, 900), {}),
                ("rows", (151, 71, 900), {"reduction": "none"}),
                ("smoothed", (97, 2, 900), {
                    "weight": True, "label_smoothing": 0.1, "softcap": 2.0, "z_loss": 0.1,
                    "return_lse": True,
                }),
                ("chunks", (1100, 20, 300), {}),
            )
        },
    },
    small={name: case(4, 3, 5, ignored=0.0, **options) for name, options in OPTIONS.items()},
    batches={
        reduction: [
            case(n, 16, 40, bias=False, z_loss=0.1, reduction=reduction, method="recomputed")
            for n in (4, 9, 17)
        ]
        for reduction in ("mean", "none")
    },
    any_strides=("cpu",),  # on a GPU the products are torch's
    settings={"triton": {"chunks": chunks_of_8_rows}},
)  # fmt: skip
