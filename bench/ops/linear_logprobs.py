"""Time linear_logprobs against F.linear + log_softmax + gather, eager and compiled, against TRL's
function on materialized logits, and against linear_cross_entropy by rows, whose time it should
have. Measured: the log-probabilities alone, and with the gradients of input and weight."""

import importlib

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, forward, gradients, main, short, torch_variants

from fastlm import ops

BF16, FP32 = torch.bfloat16, torch.float32
# rows, width, classes, dtype, with the entropy
SHAPES = [
    (1024, 576, 49152, BF16, False),
    (1024, 576, 49152, BF16, True),
    (1024, 576, 49152, FP32, False),
    (1024, 576, 49152, FP32, True),
    (507, 252, 50257, FP32, True),
    (64, 577, 128256, FP32, False),
]


def eager(x, w, target):
    logp = F.linear(x, w).float().log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0]


def eager_with_entropy(x, w, target):
    logp = F.linear(x, w).float().log_softmax(-1)
    return torch.stack((logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)))


compiled = torch.compile(eager, dynamic=False)
compiled_with_entropy = torch.compile(eager_with_entropy, dynamic=False)


def with_entropy(x, w, target):
    return torch.stack(ops.linear_logprobs(x, w, target, return_entropy=True))


def cross_entropy_rows(x, w, target):
    return ops.linear_cross_entropy(x, w, target, reduction="none")


def trl_function() -> tuple[dict, dict]:
    """Return TRL's function, or the reason why it is missing."""
    try:
        selective = importlib.import_module("trl.trainer.utils").selective_log_softmax
    except (ImportError, RuntimeError, AttributeError) as error:
        return {}, {"trl": str(error).splitlines()[0]}
    return {"trl": lambda x, w, target: selective(F.linear(x, w), target)}, {}


def of_shape(
    rows: int, width: int, classes: int, dtype: torch.dtype = BF16, entropy: bool = False
) -> list[Case]:
    def operands():
        x = torch.randn(rows, width).to(dtype).requires_grad_()
        w = (torch.randn(classes, width) * 2 / width**0.5).to(dtype).requires_grad_()
        return x, w, torch.randint(0, classes, (rows,))

    def with_gradient():
        return *operands(), torch.randn(*(2, rows) if entropy else (rows,))

    peers, missing = ({}, {}) if entropy else trl_function()
    plain, fast = (eager_with_entropy, compiled_with_entropy) if entropy else (eager, compiled)
    case_list = []
    for label, run, products, data in (
        ("fwd", forward, 1, operands),
        ("fwd+bwd", gradients, 3, with_gradient),
    ):
        variants = {"fastlm": run(with_entropy if entropy else ops.linear_logprobs)}
        variants |= torch_variants(run, plain, dtype, fast)
        variants |= {name: run(peer) for name, peer in peers.items()}
        if not entropy:
            variants["fastlm linear_cross_entropy"] = run(cross_entropy_rows)
        description = f"{label}{' with entropy' if entropy else ''}"
        case_list.append(
            Case(
                f"linear_logprobs {description} {str(dtype).removeprefix('torch.')}",
                f"{rows} x {width} -> {classes}",
                variants,
                flops=products * 2 * rows * width * classes,
                dtype=short(dtype),
                missing=missing,
                data=data,
            )
        )
    return case_list


def shape_cases(rows: int, width: int, classes: int) -> list[Case]:
    return [
        case
        for dtype in (BF16, FP32)
        for entropy in (False, True)
        for case in of_shape(rows, width, classes, dtype, entropy)
    ]


def cases() -> list[Case]:
    return [case for shape in SHAPES for case in of_shape(*shape)]


if __name__ == "__main__":
    main("linear_logprobs", cases, shape_cases)
