"""rope against Hugging Face's eager formula: training shapes, a decode step, odd sizes."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import Case, main

from fastlm import ops

# batch, query heads, key/value heads, positions, head width, rotated width
SHAPES = {
    "train": (8, 8, 8, 512, 64, 64),
    "long": (1, 32, 8, 2048, 128, 128),
    "partial": (4, 16, 16, 512, 80, 32),
    "odd": (2, 9, 3, 507, 64, 64),
    "decode": (1, 32, 8, 1, 128, 128),
    "decode odd": (1, 3, 1, 1, 80, 80),
    "three heads": (1, 3, 3, 127, 80, 80),
    "primes": (3, 5, 1, 509, 96, 96),
}
COMPILED = ("train", "long", "partial", "odd", "decode")  # the others against eager torch alone


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def hugging_face(q, k, cos, sin):
    width = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x):
        if width == x.shape[-1]:
            return x * cos + rotate_half(x) * sin
        part, rest = x[..., :width], x[..., width:]
        return torch.cat((part * cos + rotate_half(part) * sin, rest), -1)

    return turn(q), turn(k)


def cases() -> list[Case]:
    made = []
    for name, (b, h, hkv, s, d, r) in SHAPES.items():
        q = torch.randn(b, s, h, d, dtype=torch.bfloat16).transpose(1, 2)
        k = torch.randn(b, s, hkv, d, dtype=torch.bfloat16).transpose(1, 2)
        angle = torch.arange(s)[:, None] * 10000.0 ** -(torch.arange(0, r, 2) / r)
        angle = torch.cat((angle, angle), -1)[None]
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        shape = f"B {b} H {h}/{hkv} S {s} D {d} R {r}"
        moved = 4 * (q.numel() + k.numel())  # bf16: read once, write once
        compiled = torch.compile(hugging_face, dynamic=False)

        def forward(f, q=q, k=k, cos=cos, sin=sin):
            with torch.no_grad():
                return f(q, k, cos, sin)

        def both(f, q=q, k=k, cos=cos, sin=sin):
            x, y = q.detach().requires_grad_(), k.detach().requires_grad_()
            return torch.autograd.grad(f(x, y, cos, sin), (x, y), (q, k))

        for label, run, factor in (("fwd", forward, 1), ("fwd+bwd", both, 2)):
            if name.startswith("decode") and label != "fwd":
                continue
            variants = {
                "fastlm": lambda run=run: run(ops.rope),
                "torch": lambda run=run: run(hugging_face),
            }
            if name in COMPILED:
                variants["torch.compile"] = lambda run=run, c=compiled: run(c)
            made.append(Case(f"{name} {label}", shape, variants, bytes=factor * moved))
    return made


if __name__ == "__main__":
    main("rope", cases)
