"""linear against torch's (oneDNN): the layers of the models in bench/train_step.py.

As in a training step, no operand but the weight was touched since long: every call takes the next
of COPIES inputs. On operands that lie in the cache the two are equal.
"""

import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import Case, main

from fastlm import ops

COPIES = 8
# rows, K, N: 42 M, 124 M, 350 M, and odd widths
SHAPES = [
    (4096, 512, 512),
    (4096, 512, 1408),
    (4096, 1408, 512),
    (2048, 768, 2048),
    (2048, 2048, 768),
    (1024, 1024, 2816),
    (4093, 509, 1021),
]


def cases() -> list[Case]:
    made = []
    for rows, k, n in SHAPES:
        weight = (torch.randn(n, k) / k**0.5).bfloat16().requires_grad_()
        inputs = [
            (torch.randn(rows, k).bfloat16().requires_grad_(), torch.randn(rows, n).bfloat16())
            for _ in range(COPIES)
        ]

        turns = itertools.cycle(inputs)

        def both(f, turns=turns, weight=weight):
            x, dy = next(turns)
            return torch.autograd.grad(f(x, weight), (x, weight), dy)

        variants = {
            "fastlm": lambda run=both: run(ops.linear),
            "torch": lambda run=both: run(F.linear),
        }
        flops = 3 * 2 * rows * k * n
        made.append(Case("fwd+bwd bf16", f"{rows} x {k} -> {n}", variants, flops=flops))
    return made


if __name__ == "__main__":
    main("linear", cases)
