"""Time rope against Hugging Face's eager formula: training shapes, a decode step, odd sizes."""

import bench_path  # noqa: F401
import torch
from harness import Case, forward, gradients, main

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
COMPILED = ("train", "long", "partial", "odd", "decode")  # the others run against eager torch only


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


compiled = torch.compile(hugging_face, dynamic=False)


def of_shape(
    name: str, b: int, h: int, hkv: int, s: int, d: int, r: int, compare_compiled: bool = True
) -> list[Case]:
    def operands(*, grad=False):
        q = torch.randn(b, s, h, d, dtype=torch.bfloat16).transpose(1, 2)
        k = torch.randn(b, s, hkv, d, dtype=torch.bfloat16).transpose(1, 2)
        angle = torch.arange(s)[:, None] * 10000.0 ** -(torch.arange(0, r, 2) / r)
        angle = torch.cat((angle, angle), -1)[None]
        q, k = q.requires_grad_(grad), k.requires_grad_(grad)
        return q, k, angle.cos().bfloat16(), angle.sin().bfloat16()

    def with_gradient():
        q, k, cos, sin = operands(grad=True)
        return q, k, cos, sin, (q.detach(), k.detach())

    case_list = []
    for label, run, passes, data in (
        ("fwd", forward, 1, operands),
        ("fwd+bwd", gradients, 2, with_gradient),
    ):
        if s == 1 and label != "fwd":
            continue
        variants = {"fastlm": run(ops.rope), "torch": run(hugging_face)}
        if compare_compiled:
            variants["torch.compile"] = run(compiled)
        moved = 4 * b * s * d * (h + hkv)  # bf16: everything is read once and written once
        shape = f"B {b} H {h}/{hkv} S {s} D {d} R {r}"
        case_list.append(Case(f"{name} {label}", shape, variants, bytes=passes * moved, data=data))
    return case_list


def shape_cases(
    b: int, h: int, s: int, d: int, hkv: int | None = None, r: int | None = None
) -> list[Case]:
    hkv, r = hkv or h, r or d
    if r % 2 or r > d:
        raise ValueError(f"r (default: d): expected an even width of at most {d}, got {r}")
    return of_shape("custom", b, h, hkv, s, d, r)


def cases() -> list[Case]:
    return [c for n, shape in SHAPES.items() for c in of_shape(n, *shape, n in COMPILED)]


if __name__ == "__main__":
    main("rope", cases, shape_cases)
