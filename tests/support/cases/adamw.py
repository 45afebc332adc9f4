"""adamw as cases: one step of some tensors from a random state, compared with the formula.

A step computes in float32 and then rounds: to the parameter's dtype, at random, to a code of 8
bits. All of these keep order. So a result has to lie between what the definition rounds the
formula's value to in float64, less and plus the error of float32.
"""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from cases.base import DTYPES, Case, Op, OpCall, Row, choice_or_none, size
from fastlm import reference
from fastlm.ops.adamw import adamw
from fastlm.reference import AdamWOptions, AdamWTensor

STATES = ("float32", "8 bits", "master", "8 bits, master", "stochastic", "8 bits, stochastic")
ROUNDING = 2**-24  # of float32, relative
FLUSHED = 2**-126  # the largest number that a kernel may treat as zero
Parts = dict[str, Tensor]  # the tensors of an AdamWTensor by name


# ---- the tensors of a case


def initial(n: int, kind: Sequence[str], case: Case, dtype: torch.dtype) -> Parts:
    """Draw a random state of n elements. `kind`: dtypes of parameter and gradient ("": the test's),
    and the kind of the states.
    """
    param, grad = (DTYPES.get(name, dtype) for name in kind[:2])
    state = kind[2]
    if ("master" in state and param == torch.float32) or "stochastic" in state:
        param = torch.bfloat16  # float32 has no master, and is not rounded
    spread = case["spread"] * torch.exp(case["decades"] * torch.randn(n))
    w, g, m, root = (torch.randn(n) for _ in range(4))
    w[::7] = 0.0
    started = float(case["step"] > 0)
    m, root = m * spread * started, root.abs() * spread * started
    parts = {
        "param": w.to(param),
        "grad": (g * spread).to(grad),
        "step": torch.tensor(case["step"]),
    }
    parts["step"] = parts["step"].float()
    if "8 bits" in state:
        (m, m_scale), (root, root_scale) = (
            reference.pack_state(x, root=x is root) for x in (m, root)
        )
        parts |= {"exp_avg": m, "exp_avg_sq": root}
        parts |= {"exp_avg_scale": m_scale, "exp_avg_sq_scale": root_scale}
    else:
        parts |= {"exp_avg": m, "exp_avg_sq": root.square()}
    if "master" in state and param == torch.bfloat16:
        parts["param"], parts["master"] = reference.split_master(w)
        parts["param"][::5] = 0.0  # as a user may do between two steps
    elif "master" in state:
        parts["master"] = w
    return parts


def build(case: Case, dtype: torch.dtype) -> OpCall:
    kinds = [case["kinds"][i % len(case["kinds"])] for i in range(len(case["sizes"]))]
    parts = [initial(n, kind, case, dtype) for n, kind in zip(case["sizes"], kinds)]
    limit, norm_given = case["max_grad_norm"], case["norm_given"]

    def arguments(leaves: Sequence[Tensor]) -> tuple[list[AdamWTensor], Tensor | None]:
        rest = iter(leaves)
        tensors = []
        for i, (part, kind) in enumerate(zip(parts, kinds)):
            tensors_of_part = {"exp_avg_scale": None, "exp_avg_sq_scale": None, "master": None}
            tensors_of_part |= dict(zip(part, rest))
            lr, *numbers, maximize = case["options"][i % len(case["options"])]
            options = AdamWOptions(lr, *numbers, maximize, "stochastic" in kind[2])
            tensors.append(
                AdamWTensor(**tensors_of_part, options=options, seed=5 + i % 2, ordinal=2 * i + 1)
            )
        return tensors, next(rest, None)

    def function(*leaves):
        tensors, norm = arguments(leaves)
        adamw(tensors, limit or 0.0, norm, norm_given)
        return leaves

    def verify(leaves: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        (before, norm), (after, new_norm) = arguments(leaves), arguments(results)
        clip = torch.tensor(1.0, dtype=torch.float64)
        if norm is not None and new_norm is not None:
            squares = torch.stack([t.grad.double().square().sum() for t in before])
            truth = norm.double() if norm_given else squares.sum().sqrt()
            # float32 sums of up to 32 or 256 squares
            assert (new_norm.double() - truth).abs() <= (0 if norm_given else 1e-6) * truth, "norm"
            clip = (limit / (new_norm.double() + 1e-6)).clamp(max=1.0)
        for i, (old, new) in enumerate(zip(before, after)):
            verify_step(f"tensor {i}", old, new, clip)

    leaves = [t for part in parts for t in part.values()]
    if limit is not None:
        squares = sum(part["grad"].double().square().sum() for part in parts)
        leaves.append(
            torch.as_tensor(squares).sqrt().float() * 3 if norm_given else torch.tensor(-1.0)
        )
    return OpCall(
        function, leaves, verify=verify, differentiable=False, dense=tuple(range(len(leaves)))
    )


# ---- the formula


def verify_step(label: str, old: AdamWTensor, new: AdamWTensor, clip: Tensor) -> None:
    lr, beta1, beta2, eps, decay, maximize, _ = old.options
    assert torch.equal(new.grad, old.grad), f"{label}: grad is written"
    assert new.step == old.step + 1, f"{label}: step"
    t = new.step.item()
    m, v = moments(old)
    g = old.grad.double() * (-clip if maximize else clip)
    m_terms = beta1 * m.abs() + (1 - beta1) * g.abs()  # they may cancel
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    root = v.sqrt()
    # roundings of the norm's factor, g, the betas, products and sums; of g twice in v
    m_error = 8 * ROUNDING * m_terms + FLUSHED
    v_error, root_error = 16 * ROUNDING * v + FLUSHED, 9 * ROUNDING * root + FLUSHED**0.5
    if old.exp_avg_scale is None:
        between(f"{label}: exp_avg", new.exp_avg, m - m_error, m + m_error)
        between(f"{label}: exp_avg_sq", new.exp_avg_sq, v - v_error, v + v_error)
    else:
        verify_codes(f"{label}: exp_avg", new.exp_avg, new.exp_avg_scale, m, m_error, root=False)
        verify_codes(
            f"{label}: exp_avg_sq",
            new.exp_avg_sq,
            new.exp_avg_sq_scale,
            root,
            root_error,
            root=True,
        )
    w = weights(old).double()
    slope = lr / (1 - beta1**t) / (root / (1 - beta2**t) ** 0.5 + eps)
    truth = w - (lr * decay * w + slope * m)
    error = 24 * slope * m_terms + 4 * (w.abs() * (1 + lr * decay) + (slope * m).abs())
    error = ROUNDING * error + FLUSHED
    verify_weights(label, old, new, (truth - error).float(), (truth + error).float())


def moments(t: AdamWTensor) -> tuple[Tensor, Tensor]:
    if t.exp_avg_scale is None or t.exp_avg_sq_scale is None:
        return t.exp_avg.double(), t.exp_avg_sq.double()
    m = reference.unpack_state(t.exp_avg, t.exp_avg_scale, root=False)
    root = reference.unpack_state(t.exp_avg_sq, t.exp_avg_sq_scale, root=True)
    return m.double(), root.double().square()


def weights(t: AdamWTensor) -> Tensor:
    """Return the weights that the step updates: the master's, where there is one."""
    if t.master is None:
        return t.param
    return t.master if t.master.dtype == torch.float32 else reference.join_master(t.param, t.master)


def verify_weights(label: str, old: AdamWTensor, new: AdamWTensor, low: Tensor, high: Tensor):
    if new.master is not None:
        w = weights(new)
        between(f"{label}: master", w, low, high)
        halves = new.master.dtype == torch.int16
        rounded = reference.split_master(w)[0] if halves else w.to(new.param.dtype)
        assert torch.equal(new.param, rounded), f"{label}: the parameter is not its master's"
        return
    if old.options.stochastic:
        key = reference.step_key(old.seed, old.ordinal, int(old.step))
        low, high = (reference.round_stochastic(end, key) for end in (low, high))
    between(f"{label}: param", new.param, low.to(new.param.dtype), high.to(new.param.dtype))


def verify_codes(
    label: str, codes: Tensor, scale: Tensor | None, x: Tensor, error: Tensor, *, root: bool
) -> None:
    """Verify codes of x, with the largest magnitude of a block as its scale."""
    assert scale is not None
    top, slack = (blocks(t).amax(1) for t in (x.abs(), error))
    between(f"{label}_scale", scale, top - slack, top + slack)
    scales = scale.double().repeat_interleave(reference.STATE_BLOCK)[: len(x)]
    normal = scales > 1e-37  # smaller ones have no inverse
    y = torch.where(normal, x / scales, 0.0)
    error = torch.where(normal, error / scales, 0.0) + 4 * ROUNDING * y.abs()
    values = reference.unpack_state(codes, torch.ones_like(scale), root=root).double()
    between(label, values, nearest(y - error, root=root), nearest(y + error, root=root))


def nearest(y: Tensor, *, root: bool) -> Tensor:
    """Return the nearest values that have a code. A root above zero has the smallest code that is
    not zero.
    """
    codes = torch.arange(256 if root else 128, dtype=torch.uint8, device=y.device)
    values = reference.unpack_state(codes, torch.ones(1, device=y.device), root=root).double()
    index = torch.searchsorted((values[1:] + values[:-1]) / 2, y.abs(), right=True)
    if root:
        return values[torch.maximum(index, (y > 0).long())].where(y > 0, 0.0)
    return values[index].copysign(y)


def blocks(x: Tensor) -> Tensor:
    rest = -len(x) % reference.STATE_BLOCK
    return torch.nn.functional.pad(x, (0, rest)).view(-1, reference.STATE_BLOCK)


def between(label: str, actual: Tensor, low: Tensor, high: Tensor) -> None:
    wrong = ~((low <= actual) & (actual <= high))
    if wrong.any():
        i = int(wrong.int().argmax())
        g, a, b = (t[i].item() for t in (actual, low, high))
        raise AssertionError(
            f"{label}: {g:.9e} in element {i} of {len(actual)}, expected {a:.9e} to {b:.9e};"
            f" {int(wrong.sum())} are wrong"
        )


# ---- the table


def draw(r: Random, isa: str) -> Case:
    long = 10000 if isa == "simt" else 90000
    count = r.choice([1, 2, 5])
    names = ["", *DTYPES]
    return {
        "sizes": [size(r, long // count) for _ in range(count)],
        "kinds": [
            [r.choice(names), r.choice(names), r.choice(STATES)] for _ in range(r.choice([1, 2]))
        ],
        "step": r.choice([0, 1, 30, 100_000]),
        "options": [
            [
                r.choice([1e-4, 1e-2]), *r.choice([(0.9, 0.999), (0.8, 0.95), (0.0, 0.0)]),
                r.choice([1e-8, 1e-6]), r.choice([0.0, 0.1]), r.random() < 0.2,
            ]
            for _ in range(r.choice([1, 2]))
        ],
        "spread": r.choice([1e-6, 1.0, 100.0]),
        "decades": r.choice([0.0, 0.0, 1.0]),
        "max_grad_norm": choice_or_none(r, 0.5, 1e6),
        "norm_given": r.random() < 0.2,
    }  # fmt: skip


# lr, betas, eps, weight decay, maximize
USUAL = [1e-2, 0.8, 0.95, 1e-8, 0.1, False]
OTHERS = [[3e-3, 0.9, 0.999, 1e-6, 0.0, True], USUAL, [1e-4, 0.0, 0.0, 1e-8, 0.1, False]]


def case(
    *sizes: int, kinds=(("", "", "float32"),), step=4, options=(USUAL,), decades=0.0, clip=None,
    norm_given=False,
) -> Case:  # fmt: skip
    return {
        "sizes": list(sizes), "kinds": [list(kind) for kind in kinds], "step": step,
        "options": [list(o) for o in options], "spread": 1.0, "decades": decades,
        "max_grad_norm": clip, "norm_given": norm_given,
    }  # fmt: skip


def of(state: str, grad: str = "") -> list[tuple[str, str, str]]:
    return [("", grad, state)]


EVERY = [
    ("float32", "float32", "float32"), ("bfloat16", "", "stochastic"), ("bfloat16", "", "master"),
    ("float16", "bfloat16", "master"), ("float32", "", "8 bits"),
    ("bfloat16", "float16", "8 bits, master"), ("float16", "", "float32"),
    ("bfloat16", "float32", "8 bits, stochastic"), ("bfloat16", "", "float32"),
]  # fmt: skip
SPLIT = (77100, 70001, 9)

OP = Op(
    build,
    draw,
    rows={
        # past a vector, a warp's 256, a program's 1024 elements; one element; none
        "first step": Row(case(1300, 257, 21, 1, 0, step=0)),
        "clipped, gradients in float32": Row(
            case(1300, 21, kinds=of("float32", "float32"), clip=0.5)
        ),
        "not clipped, gradients in bfloat16": Row(
            case(1300, 21, kinds=of("float32", "bfloat16"), clip=1e6)
        ),
        "norm given, gradients in float16": Row(
            case(
                1300, 21, kinds=of("float32", "float16"), options=OTHERS, clip=7.0, norm_given=True
            )
        ),
        "8 bits": Row(case(1400, 512, 3, kinds=of("8 bits"), clip=0.5), bits=True),
        "8 bits, first step": Row(case(1300, kinds=of("8 bits", "float16"), step=0)),
        "8 bits, every magnitude": Row(
            case(1400, kinds=of("8 bits", "float32"), options=OTHERS[2:], decades=5.0)
        ),
        "master": Row(case(1300, 5, kinds=of("master"))),
        "8 bits, master": Row(case(1300, 5, kinds=of("8 bits, master"))),
        # past the 32768 elements that share a key of random numbers
        "stochastic": Row(case(33000, 5, kinds=of("stochastic"), clip=1.0)),
        "8 bits, stochastic": Row(case(1300, 5, kinds=of("8 bits, stochastic"))),
        "every kind in one step": Row(
            case(*[300] * 9, 40, 0, kinds=EVERY, options=OTHERS, clip=0.5), bits=True
        ),
        # 1 - beta^t needs float64, and float32 counts no further than 2^24
        "late": Row(case(40, options=[[0.1, 0.99999, 0.999999, 1e-8, 0.0, False]], step=123_456)),
        "second step": Row(case(40, options=[[0.1, 0.9, 0.9999, 1e-8, 0.0, False]], step=1)),
        "as late as possible": Row(
            case(40, options=[[0.1, 0.9, 0.9999999, 1e-8, 0.0, False]], step=2**24)
        ),
        "no elements": Row(case(0, 0, kinds=(*of("float32"), *of("8 bits")), clip=0.5)),
        # more than the lanes of the kernel that counts the steps
        "many tensors": Row(case(3, *[0] * 70, 5, *[0] * 70, 4, clip=0.5)),
        **{
            f"split, {state}": Row(
                case(*SPLIT, kinds=of(state, "float32"), clip=1.0), on=("cpu",), split=True
            )
            for state in STATES[:-1]
        },
    },
)  # fmt: skip
