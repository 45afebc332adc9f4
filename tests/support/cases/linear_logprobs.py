"""linear_logprobs as cases."""

import math
from random import Random

import torch
import torch.nn.functional as F

from cases import losses
from cases.base import Case, Op, OpCall, Row, Terms, choice_or_none, drop_unset
from cases.linear_cross_entropy import HARD, draw_shape
from fastlm import ops


def definition(x, w, target, bias=None, *, temperature=1.0, softcap=None, ignore_index=-100):
    """Both outputs."""
    z = losses.product(x, w, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(1)
    ignored = target == ignore_index
    at_target = logp.gather(1, target.masked_fill(ignored, 0)[:, None])[:, 0]
    finite = logp.masked_fill(logp == -math.inf, 0)  # a masked class: 0 * -inf
    entropy = -(logp.exp() * finite).sum(1)
    return at_target.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)


def build(case: Case, dtype: torch.dtype) -> OpCall:
    rows, width, classes = case["shape"]
    x, w, bias = losses.tensors(case, dtype, width)
    target, _, options = losses.targets(case | {"weight": False}, rows, classes)
    options.pop("reduction", None)
    entropy = case["entropy"]

    def function(x, w, target, bias=None):
        return ops.linear_logprobs(
            x, w, target, linear_bias=bias, return_entropy=entropy, **options
        )

    def plain(x, w, target, bias=None):
        both = definition(x, w, target, bias, **options)
        return both if entropy else both[0]

    def terms(x, w, target, *rest):
        bias, upstream = (rest[0], rest[1:]) if case["bias"] else (None, rest)
        temperature, softcap = options.get("temperature", 1.0), options.get("softcap")
        below, log_sum, _, p, p_size, slope, size = losses.scores(
            F.linear(x, w, bias), losses.logit_size(x, w, bias), softcap=softcap,
            scale=1 / temperature,
        )  # fmt: skip
        valid = target != options["ignore_index"]
        one_hot = F.one_hot(target.where(valid, 0), classes)
        error = size + (p * size).sum(1, keepdim=True)
        logp = below + log_sum
        h = (p * logp).sum(1, keepdim=True)
        of_entropy = (p * (logp + (logp - h).abs() * size)).sum(1) * valid
        # exponentials are relative to another score than the largest, which is subtracted again
        float32 = of_entropy + (p * size).sum(1) * valid
        sizes = {
            "logprob": (one_hot * (logp + error)).sum(1) * valid,
            "entropy": Terms(of_entropy, float32),
        }
        if not upstream:
            return sizes
        on, on_entropy = (
            (upstream[i] * valid)[:, None] if i < len(upstream) else torch.zeros_like(h)
            for i in range(2)
        )
        of_target = on.abs() * one_hot
        of_p = on_entropy * (logp - h) - on  # added before it is rounded
        scale = slope / temperature * (of_target + of_p.abs() * p)
        # an error of a logit is one of p, of log p and of the entropy
        of_p = (on.abs() + on_entropy.abs() * (logp + h)) * (1 + logp + error)
        float32 = (of_target + (of_p + on_entropy.abs() * error) * p_size) / temperature
        return sizes | losses.product_sizes(x, w, scale, float32, dtype)

    outputs = ("logprob", "entropy") if entropy else ("logprob",)
    return OpCall(function, [x, w, target, *bias], plain, terms, outputs)


def draw(r: Random, isa: str) -> Case:
    shape = draw_shape(r, isa)
    loss = losses.draw(r, shape[2])
    options = drop_unset(
        temperature=choice_or_none(r, 0.3, 2.0), softcap=choice_or_none(r, 2.0, 30.0)
    )
    of_loss = {key: loss[key] for key in ("ignored", "ignore_index", "spread")}
    return {
        "shape": shape, "bias": r.random() < 0.5, **of_loss, "entropy": r.random() < 0.7,
        "options": options,
    }  # fmt: skip


def case(*shape: int, bias=True, values="", entropy=True, **loss) -> Case:
    return {
        "shape": list(shape), "bias": bias, "values": values, "entropy": entropy,
        **losses.case(**loss),
    }  # fmt: skip


def parts_of_rows(patch) -> None:
    """Chunks of 8 rows, of which the last is ragged; several blocks and parts per row."""
    from fastlm.kernels import cross_entropy, linear_cross_entropy

    patch.setattr(linear_cross_entropy, "_TILE", 8)
    patch.setattr(cross_entropy, "_BLOCK", 32)


def whole_rows(patch) -> None:
    from fastlm.kernels import cross_entropy

    parts_of_rows(patch)
    patch.setattr(cross_entropy, "_WAVES", 1)


OP = Op(
    build,
    draw,
    kernels=("cpu", "triton"),
    rows={
        "plain": Row(case(11, 40, 83), bits=True),
        "temperature": Row(case(11, 40, 83, temperature=0.6)),
        "softcap": Row(case(11, 40, 83, softcap=5.0, temperature=1.7)),
        "no entropy": Row(case(9, 16, 70, bias=False, ignored=0.0, entropy=False), bits=True),
        "no entropy, options": Row(
            case(37, 50, 300, entropy=False, softcap=5.0, temperature=1.7), on=("cpu",)
        ),
        "one row, one feature, one class": Row(case(1, 1, 1, ignored=0.0, entropy=False)),
        "three classes": Row(case(2, 1, 3)),
        "one row": Row(case(1, 50, 300), on=("cpu",)),
        "two blocks": Row(case(70, 64, 513), on=("cpu",)),
        "ragged": Row(case(252, 507, 123), on=("cpu",)),
        "more rows than a chunk": Row(case(530, 40, 700), on=("cpu",)),
        "large vocabulary": Row(case(5, 64, 5003), on=("cpu",)),
        **{f"{v}, blocks": Row(case(40, 32, 700, values=v), on=("cpu",)) for v in HARD},
        **{v: Row(case(8, 32, 70, values=v), on=("triton",)) for v in HARD[:3]},
        "no rows": Row(case(0, 8, 20)),
        "every row ignored": Row(case(3, 8, 20, ignored=1.0)),
        "split": Row(
            case(151, 71, 900, ignored=0.3, spread=1.0, softcap=9.0, temperature=0.7), ("cpu",),
            split=True,
        ),
    },
    small={
        "entropy": case(4, 3, 5, temperature=0.7),
        "alone": case(4, 3, 5, bias=False, entropy=False, softcap=3.0),
    },
    batches={
        str(entropy): [
            case(n, 16, 40, bias=False, ignored=0.0, entropy=entropy, temperature=0.7)
            for n in (4, 9, 17)
        ]
        for entropy in (False, True)
    },
    any_strides=("cpu",),  # on a GPU the products are torch's
    settings={"triton": {"parts of rows": parts_of_rows, "whole rows": whole_rows}},
)  # fmt: skip
