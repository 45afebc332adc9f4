"""cross_entropy on logits against eager torch and torch.compile: forward, and with gradients."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import Case, main

from fastlm import ops

# rows, classes, dtype; odd ones against eager torch alone
SHAPES = [
    (4096, 32768, torch.float32),
    (4096, 32768, torch.bfloat16),
    (252, 50257, torch.bfloat16),
    (64, 128256, torch.float32),
]
ODD = [
    (rows, classes, dtype)
    for rows, classes in [(1, 50257), (1, 128256), (127, 50257), (67, 128256), (4093, 509), (1, 3)]
    for dtype in (torch.float32, torch.bfloat16)
]


def cases() -> list[Case]:
    made = []
    for rows, classes, dtype in SHAPES + ODD:
        logits = torch.randn(rows, classes).to(dtype).requires_grad_()
        target = torch.randint(0, classes, (rows,))
        compiled = torch.compile(F.cross_entropy, dynamic=False)

        def forward(f, logits=logits, target=target):
            with torch.no_grad():
                return f(logits, target)

        def both(f, logits=logits, target=target):
            return torch.autograd.grad(f(logits, target), logits)

        # forward reads the logits; backward reads them and writes as much
        for label, run, passes in (("fwd", forward, 1), ("fwd+bwd", both, 3)):
            name = f"cross_entropy {label} {str(dtype).removeprefix('torch.')}"
            variants = {
                "fastlm": lambda run=run: run(ops.cross_entropy),
                "torch": lambda run=run: run(F.cross_entropy),
            }
            if (rows, classes, dtype) in SHAPES:
                variants["torch.compile"] = lambda run=run, c=compiled: run(c)
            size = rows * classes * dtype.itemsize
            made.append(Case(name, f"{rows} x {classes}", variants, bytes=passes * size))
    return made


if __name__ == "__main__":
    main("cross_entropy", cases)
