"""glu against eager torch and torch.compile: SwiGLU of the training shapes, GeGLU, decode."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import Case, main

from fastlm import ops

# rows, columns, activation, gate and up as halves of one projection; bf16
SHAPES = [
    (4096, 2816, "silu", False),
    (4096, 1408, "silu", False),
    (4096, 1408, "silu", True),
    (4096, 1408, "gelu_tanh", False),
    (4096, 1408, "gelu", False),
    (252, 507, "silu", False),
    (1, 14336, "silu", False),
    (1, 1536, "silu", False),
]
# against eager torch alone, bf16 and float32
ODD = [(1, 509), (1, 1536), (3, 80), (509, 1021), (4093, 80)]


def shapes():
    yield from ((*shape, torch.bfloat16, True) for shape in SHAPES)
    for dtype in (torch.bfloat16, torch.float32):
        for rows, columns in ODD:
            if (rows, columns, "silu", False) not in SHAPES or dtype != torch.bfloat16:
                yield rows, columns, "silu", False, dtype, False


def eager(gate, up, *, act):
    if act == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def cases() -> list[Case]:
    made = []
    for rows, columns, act, halves, dtype, compare_compiled in shapes():
        if halves:
            gate, up = torch.randn(rows, 2 * columns).to(dtype).chunk(2, -1)
        else:
            gate, up = (torch.randn(rows, columns).to(dtype) for _ in range(2))
        dy = torch.randn(rows, columns).to(dtype)
        compiled = torch.compile(eager, dynamic=False)

        def forward(f, gate=gate, up=up, act=act):
            with torch.no_grad():
                return f(gate, up, act=act)

        def both(f, gate=gate, up=up, act=act, dy=dy):
            g, u = gate.detach().requires_grad_(), up.detach().requires_grad_()
            return torch.autograd.grad(f(g, u, act=act), (g, u), dy)

        shape = f"{rows} x {columns}" + (" halves" if halves else "")
        for label, run, operands in (("fwd", forward, 3), ("fwd+bwd", both, 8)):
            if rows == 1 and compare_compiled and label != "fwd":
                continue
            variants = {
                "fastlm": lambda run=run: run(ops.glu),
                "torch": lambda run=run: run(eager),
            }
            if compare_compiled:
                variants["torch.compile"] = lambda run=run, c=compiled: run(c)
            moved = operands * rows * columns * dtype.itemsize
            kind = "" if dtype == torch.bfloat16 else " fp32"
            made.append(Case(f"{act} {label}{kind}", shape, variants, bytes=moved))
    return made


if __name__ == "__main__":
    main("glu", cases)
