"""cross_entropy as cases."""

from random import Random

import torch

from cases import losses
from cases.base import SLOW, Case, Op, OpCall, Row, Terms, size
from fastlm import ops

HARD = ("peaked", "all negative", "common offset", "rising", "falling")


def hard(logits: torch.Tensor, target: torch.Tensor, values: str) -> torch.Tensor:
    """Faults seen in other implementations: a padded column counted as exp(0), a maximum that
    starts at 0, an lse rounded at 1e4.
    """
    rows, classes = logits.shape
    if values == "peaked":
        logits = logits.clone()
        logits[torch.arange(rows), target.clamp_min(0)] += 80
        logits[1] -= 60
        logits[1, 3] = 60
        return logits
    if values == "all negative":
        return -logits.abs() - 50
    if values == "common offset":
        return logits / 3 + 1e4
    ramp = torch.linspace(-90, 90, classes)
    return (ramp if values == "rising" else ramp.flip(0)).repeat(rows, 1)


def build(case: Case, dtype: torch.dtype) -> OpCall:
    rows, classes = case["shape"]
    logits = torch.randn(rows, classes) * case["spread"]
    target, weight, options = losses.targets(case, rows, classes)
    if case.get("soft"):
        target = (2 * torch.randn(rows, classes)).softmax(-1).to(dtype)
    if values := case.get("values"):
        logits = hard(logits, target, values)

    def function(logits, target, weight=None):
        return ops.cross_entropy(logits, target, weight=weight, **options)

    def plain(logits, target, weight=None):
        return losses.definition(logits, target, weight, **options)

    def terms(logits, target, *rest):
        weight = rest[0] if case["weight"] else None
        of, scale, float32 = losses.sizes(logits, target, weight, rest[case["weight"] :], **options)
        return of | {"dlogits": Terms(scale, float32)}

    outputs = ("loss", "lse") if options.get("return_lse") else ("loss",)
    leaves = [logits.to(dtype), target, *weight]
    # the sum of a row's probabilities is torch's
    soft = case.get("soft", False)
    return OpCall(function, leaves, plain, terms, outputs, constant=(1, 2), library=soft)


def draw(r: Random, isa: str) -> Case:
    while True:
        rows = size(r, 200)
        classes = size(r, 2000 if isa in SLOW else 9000, 2)
        if isa != "simt" or rows * classes <= 10000:
            break
    case = {"shape": [rows, classes], **losses.draw(r, classes)}
    if isa != "simt" and r.random() < 0.2:
        case |= {"soft": True, "ignore_index": -100}
    return case


def case(rows: int, classes: int, *, values: str = "", soft: bool = False, **loss) -> Case:
    return {"shape": [rows, classes], "values": values, "soft": soft, **losses.case(**loss)}


def blocks_of_64(patch, programs: int = 1) -> None:
    """Several blocks per row; split rows have programs for the most rows of the table."""
    from fastlm.kernels import cross_entropy as module

    patch.setattr(module, "_BLOCK", 64)
    patch.setattr(module, "_WAVES", 1)
    patch.setattr(module, "multiprocessors", lambda device: programs)


def parts_of_128_bytes(patch) -> None:
    """Split rows: enough blocks for the most rows of the table."""
    from fastlm.cuda import constants
    from fastlm.cuda import cross_entropy as module

    patch.setattr(constants(), "CROSS_ENTROPY_PART_BYTES", 128)
    patch.setattr(module, "_WAVES", 1)
    patch.setattr(module, "multiprocessors", lambda device: 40)


GPU, SOFT = ("triton", "cuda"), ("cpu", "triton")  # CUDA has no kernel for soft targets
SMOOTH = {"label_smoothing": 0.1}
OPTIONS = {
    "mean": {},
    "sum, z-loss, weights": {"reduction": "sum", "z_loss": 1e-2, "weight": True},
    "rows, lse": {"reduction": "none", "return_lse": True},
    "smoothing, items, weights": {"label_smoothing": 0.1, "num_items": 77, "weight": True},
    "softcap, scale, lse": {"softcap": 5.0, "logit_scale": 0.7, "return_lse": True},
    "softcap, scale": {"softcap": 5.0, "logit_scale": 0.7},
    "everything": {
        "softcap": 5.0, "label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "none",
        "weight": True, "return_lse": True,
    },
}  # fmt: skip
SOFT_OPTIONS = {
    "soft": {},
    "soft, smoothing, items, weights": {
        "label_smoothing": 0.1, "num_items": 77, "weight": True, "return_lse": True,
    },
    "soft, sum, softcap, scale": {"reduction": "sum", "softcap": 5.0, "logit_scale": 0.7},
    "soft, rows, z-loss": {"reduction": "none", "z_loss": 1e-2},
}  # fmt: skip

OP = Op(
    build,
    draw,
    rows={
        **{name: Row(case(5, 323, **options)) for name, options in OPTIONS.items()},
        "strided": Row(case(3, 83, label_smoothing=0.1, z_loss=0.1, reduction="none"), bits=True),
        "strided mean": Row(case(3, 83), bits=True),
        # C++ keeps 64 rows' statistics on the stack, and reads blocks of 1024 classes
        "64 rows": Row(case(64, 123), on=("cpu",)),
        "65 rows": Row(case(65, 123, ignored=0.0), on=("cpu",)),
        **{f"{n} classes": Row(case(3, n, **SMOOTH)) for n in (1, 2, 17)},
        **{f"{n} classes": Row(case(3, n, **SMOOTH), on=("cpu",)) for n in (1023, 1024, 1025)},
        **{f"{n} classes": Row(case(3, n, **SMOOTH), on=("triton",)) for n in (63, 64, 65)},
        **{f"{n} classes": Row(case(3, n, **SMOOTH), on=("cuda",)) for n in (3, 7, 8, 256)},
        # split rows: two parts of two blocks, and one of a class
        "257 classes": Row(case(14, 257, **SMOOTH), on=("triton",)),
        **{
            f"{values}, a block and a part": Row(
                case(3, 1500, values=values, return_lse=True), on=("cpu",)
            )
            for values in HARD
        },
        # the sum over all classes is relative to the maximum, so that an offset does not drown it
        **{
            values: Row(
                case(3, 200, values=values, reduction="none", return_lse=True, **SMOOTH), on=GPU
            )
            for values in HARD
        },
        **{f"{values}, mean": Row(case(3, 200, values=values), on=GPU) for values in HARD[1:3]},
        "no rows": Row(case(0, 7, reduction="sum")),
        "every row ignored": Row(case(3, 9, ignored=1.0, num_items=5)),
        "large vocabulary": Row(case(3, 50257, z_loss=1e-2), on=("cpu",)),
        "large vocabulary, shipped": Row(case(2, 50257), on=("triton",), shipped=True),
        "many rows, shipped": Row(case(40, 5000, **SMOOTH), on=("triton",), shipped=True),
        # more than UNROLL vectors per thread, and the parts that ship: 2 for a row of float32
        "several vectors a thread": Row(case(1, 8201, **SMOOTH), on=("cuda",), shipped=True),
        "two parts a row": Row(case(17, 5127), on=("cuda",), shipped=True),
        "parts of 16 bits": Row(case(1, 16389, z_loss=1e-2), on=("cuda",), shipped=True),
        "more rows than threads of the sum": Row(case(1100, 3), on=("cuda",), shipped=True),
        **{
            name: Row(case(5, 323, soft=True, **options), on=SOFT, bits=not options)
            for name, options in SOFT_OPTIONS.items()
        },
        "soft, 1 class": Row(case(1, 1, soft=True), on=SOFT),
        "soft, several spans": Row(case(2, 40000, soft=True, **SMOOTH), on=("cpu",)),
        "soft, large vocabulary": Row(case(1, 33000, soft=True), on=("triton",), shipped=True),
        "split": Row(
            case(67, 3001, ignored=0.3, spread=1.0, z_loss=0.1, return_lse=True),
            on=("cpu",), split=True,
        ),
        "split smoothed": Row(
            case(67, 3001, ignored=0.3, spread=1.0, label_smoothing=0.1, softcap=9.0),
            on=("cpu",), split=True,
        ),
        "split mean": Row(case(67, 3001), on=("cpu",), split=True),
    },
    small={name: case(5, 7, **options) for name, options in OPTIONS.items()}
    | {name: case(5, 7, soft=True, **options) for name, options in SOFT_OPTIONS.items()},
    batches={
        "mean": [case(n, 64, ignored=0.0, softcap=9.0) for n in (5, 9, 70)],
        "options": [
            case(n, 64, weight=True, label_smoothing=0.1, z_loss=0.1, softcap=9.0)
            for n in (4, 9, 17)
        ],
        "soft": [case(n, 20, soft=True, label_smoothing=0.1) for n in (4, 5, 9)],
    },
    any_strides=("cpu", "triton"),
    settings={
        "triton": {
            "blocks": blocks_of_64,
            "split rows": lambda patch: blocks_of_64(patch, programs=40),
        },
        "cuda": {"split rows": parts_of_128_bytes},
    },
)  # fmt: skip
