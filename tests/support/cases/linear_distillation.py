"""linear_distillation as cases."""

import math
from random import Random

import torch
import torch.nn.functional as F

from cases import losses
from cases.base import DTYPES, SLOW, Case, Op, OpCall, Row, Terms, choice_or_none, drop_unset, size
from fastlm import ops

KINDS = ("forward", "reverse", "jsd")


def log_probabilities(x, w, temperature, softcap):
    z = losses.product(x, w)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(-1)


def divergence(log_s, log_t, kind, beta):
    s, t = log_s.exp(), log_t.exp()
    if kind == "forward":
        return t * (log_t - log_s)
    if kind == "reverse":
        return s * (log_s - log_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return beta * t * (log_t - log_m) + (1 - beta) * s * (log_s - log_m)


def definition(
    student, student_weight, teacher, teacher_weight, mask=None, *, kind="forward", beta=0.5,
    temperature=1.0, num_items=None, student_softcap=None, teacher_softcap=None,
):  # fmt: skip
    """The formula."""
    log_s = log_probabilities(student, student_weight, temperature, student_softcap)
    log_t = log_probabilities(teacher, teacher_weight, temperature, teacher_softcap)
    rows = divergence(log_s, log_t, kind, beta).sum(-1)
    rows = rows if mask is None else torch.where(mask != 0, rows, 0.0)
    items = num_items or (max(1, rows.numel()) if mask is None else (mask != 0).sum().clamp(min=1))
    return rows.sum() / items


def shift(values: str | None, x, w, teacher, teacher_weight) -> None:
    """Give every head a feature of ones. Its weight shifts all logits."""
    if values == "apart":  # almost all of either's probability is where the other's is 0
        w[:350] -= 4 * torch.eye(350, w.shape[1]).to(w.dtype)
        x[:, 0], w[:350, 0] = 16.0, 8.0
        teacher[:, 0], teacher_weight[350:, 0] = 16.0, 8.0
    elif values in ("all negative", "common offset"):
        for a, b, offset in ((x, w, 1.0), (teacher, teacher_weight, 4.0)):
            a[:, 0] = 64.0
            b[:, 0] = offset * (-4.0 if values == "all negative" else 32.0)


def build(case: Case, dtype: torch.dtype) -> OpCall:
    rows, width, teacher_width, _ = case["shape"]
    teacher_dtype = DTYPES[case["teacher_dtype"]] if "teacher_dtype" in case else dtype
    student, teacher = (
        losses.tensors(case, kind, n)[:2]
        for n, kind in ((width, dtype), (teacher_width, teacher_dtype))
    )
    shift(case.get("values"), *student, *teacher)
    mask = [torch.rand(rows) >= case["left_out"]] if case["left_out"] else []
    if rows > 1 and 0 < case["left_out"] < 1:
        mask[0][0], mask[0][-1] = True, False
    options = case["options"]

    def function(x, w, teacher, teacher_weight, mask=None):
        return ops.linear_distillation(x, w, teacher, teacher_weight, mask=mask, **options)

    def plain(*tensors):
        return definition(*tensors, **options)

    def terms(x, w, teacher, teacher_weight, *rest):
        counted = rest[0] if mask else torch.ones(rows, dtype=torch.bool, device=x.device)
        upstream = rest[len(mask) :]
        kind, beta = options.get("kind", "forward"), options.get("beta", 0.5)
        scale = 1 / options.get("temperature", 1.0)
        s, t = (
            losses.scores(
                F.linear(a, b), losses.logit_size(a, b),
                softcap=options.get(f"{name}_softcap"), scale=scale,
            )
            for name, a, b in (("student", x, w), ("teacher", teacher, teacher_weight))
        )  # fmt: skip
        items = options.get("num_items") or max(1, int(counted.sum()))
        keep = counted[:, None] / items
        log_s, log_t = -s.below - s.log_sum, -t.below - t.log_sum
        # the errors of float32, in roundings: of a logarithm, thus of a probability
        of_s, of_t = (
            1 + log.abs() + head.size + (head.p * head.size).sum(1, keepdim=True)
            for head, log in ((s, log_s), (t, log_t))
        )
        if kind == "jsd":
            log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
            share_t, share_s = beta * (log_t - log_m).exp(), (1 - beta) * (log_s - log_m).exp()
            # the logarithm of m / max(s, t) rounds a sum of that size
            rounding = (torch.maximum(log_s, log_t) - log_m).exp()
            heads = (
                (s.p * (1 - beta), log_s - log_m, of_s, share_t * (of_s + of_t) + rounding),
                (t.p * beta, log_t - log_m, of_t, share_s * (of_s + of_t) + rounding),
            )
        elif kind == "reverse":
            heads = ((s.p, log_s - log_t, of_s, of_s + of_t),)
        else:
            heads = ((t.p, log_t - log_s, of_t, of_s + of_t),)
        loss = Terms(
            sum((keep * p * log.abs()).sum() for p, log, *_ in heads),
            sum((keep * p * (log.abs() * of_p + of_log)).sum() for p, log, of_p, of_log in heads),
        )
        if not upstream:
            return {"loss": loss}
        if kind == "forward":
            dz, float32 = s.p - t.p, s.p_size * of_s + t.p_size * of_t
        else:  # s (log - mean), the mean of a logarithm over s
            _, log, _, of_log = heads[0]
            share = 1 - beta if kind == "jsd" else 1
            mean = (s.p * log).sum(1, keepdim=True)
            of_mean = (s.p * (log.abs() * of_s + of_log)).sum(1, keepdim=True)
            dz = share * s.p * (log - mean)
            of_all = (log - mean).abs() * of_s + log.abs() + mean.abs() + of_log + of_mean
            float32 = share * s.p_size * of_all
        on = upstream[0].abs() * keep * scale
        sizes = losses.product_sizes(x, w, on * s.slope * dz.abs(), on * float32, dtype)
        return {"loss": loss} | sizes

    return OpCall(function, [*student, *teacher, *mask], plain, terms, ("loss",), constant=(2, 3))


def draw(r: Random, isa: str) -> Case:
    work = 4e6 if isa in SLOW else 8e7
    while True:
        shape = [size(r, 1200), size(r, 300, 1), size(r, 300, 1), size(r, 6000, 2)]
        if shape[0] * (shape[1] + shape[2]) * shape[3] <= work:
            break
    return {
        "shape": shape,
        "left_out": r.choice([0.0, 0.0, 0.3, 1.0]),
        "spread": r.choice([0.1, 1.0, 3.0, 20.0]),
        "options": drop_unset(
            kind=r.choice(KINDS),
            beta=r.choice([0.5, 0.1, 0.9]),
            temperature=r.choice([1.0, 0.5, 3.0]),
            num_items=choice_or_none(r, 77),
            student_softcap=choice_or_none(r, 2.0, 30.0),
            teacher_softcap=choice_or_none(r, 30.0),
        ),
    }


def case(*shape: int, left_out=0.0, spread=2.0, values="", **options) -> Case:
    return {
        "shape": list(shape), "left_out": left_out, "spread": spread, "values": values,
        "options": options,
    }  # fmt: skip


def chunks_of_4_rows(patch) -> None:
    """The last chunk is ragged, and rows have several blocks."""
    from fastlm.kernels import linear_distillation as module

    patch.setattr(module, "_TILE", 4)
    patch.setattr(module, "_BLOCK", 64)


OPTIONS = {
    "plain": {},
    "warm": {"temperature": 2.0, "beta": 0.1},
    "items": {"temperature": 0.7, "num_items": 77, "beta": 0.9},
    "softcaps": {"student_softcap": 5.0, "teacher_softcap": 3.0, "temperature": 1.5},
}

OP = Op(
    build,
    draw,
    kernels=("cpu", "triton"),
    rows={
        **{
            f"{name}, {kind}": Row(
                case(11, 40, 24, 150, kind=kind, **options),
                bits=name == "softcaps",
                on=("cpu", "triton") if name in ("warm", "softcaps") else ("cpu",),
            )
            for name, options in OPTIONS.items()
            for kind in KINDS
        },
        **{
            f"{name}, {kind}": Row(case(*shape, kind=kind, **options), on=on)
            for kind in KINDS
            for name, shape, options, on in (
                ("three classes", (2, 1, 2, 3), {}, ("cpu", "triton")),
                ("masked", (9, 16, 12, 70), {"left_out": 0.5}, ("cpu", "triton")),
                ("peaked", (5, 32, 32, 100), {"values": "peaked"}, ("cpu", "triton")),
                ("no rows", (0, 8, 5, 20), {}, ("cpu", "triton")),
                *(
                    (v, (40, 32, 24, 700), {"values": v}, ("cpu",))
                    for v in ("all negative", "common offset", "apart")
                ),
                ("offset", (5, 32, 32, 100), {"values": "common offset"}, ("triton",)),
                ("two blocks", (70, 64, 32, 513), {}, ("cpu",)),
                ("ragged", (252, 123, 60, 507), {}, ("cpu",)),
                ("large vocabulary", (5, 64, 40, 5003), {}, ("cpu",)),
            )
        },
        "one of each": Row(case(1, 1, 1, 1), on=("triton",)),
        "teacher in bfloat16": Row(
            case(6, 32, 12, 33, kind="jsd") | {"teacher_dtype": "bfloat16"}, bits=True
        ),
        "every row left out": Row(case(3, 8, 5, 20, left_out=1.0)),
        **{
            f"split {kind}": Row(
                case(151, 71, 40, 900, left_out=0.3, spread=1.0, kind=kind), ("cpu",), split=True
            )
            for kind in KINDS
        },
        "split chunks": Row(
            case(1100, 20, 12, 300, spread=1.0, kind="jsd", student_softcap=2.0), ("cpu",),
            split=True,
        ),
    },
    small={
        f"{name}, {kind}": case(4, 3, 2, 5, left_out=0.3 * (name == "items"), kind=kind, **options)
        for name, options in OPTIONS.items()
        for kind in KINDS
    },
    batches={
        "forward": [case(n, 16, 12, 40, temperature=2.0) for n in (4, 9, 17)],
        "jsd": [case(n, 16, 12, 40, left_out=0.5, kind="jsd") for n in (4, 9, 17)],
    },
    any_strides=("cpu",),  # on a GPU the products are torch's
    settings={"triton": {"chunks": chunks_of_4_rows}},
)  # fmt: skip
