"""Time glu against eager torch and torch.compile: SwiGLU at the training shapes, GeGLU, decode."""

from functools import partial

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, forward, gradients, main

from fastlm import ops

BF16, FP32 = torch.bfloat16, torch.float32
# rows, columns, activation, whether gate and up are halves of one projection; bf16
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
# against eager torch only, bf16 and float32
ODD = [(1, 509), (1, 1536), (3, 80), (509, 1021), (4093, 80)]


def eager(gate, up, *, act):
    if act == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


compiled = torch.compile(eager, dynamic=False)


def of_shape(
    rows: int,
    columns: int,
    act: str = "silu",
    halves: bool = False,
    dtype: torch.dtype = BF16,
    odd: bool = False,
) -> list[Case]:
    def operands(*, grad=False):
        if halves:
            both = torch.randn(rows, 2 * columns).to(dtype).chunk(2, -1)
        else:
            both = (torch.randn(rows, columns).to(dtype) for _ in range(2))
        gate, up = (t.requires_grad_(grad) for t in both)
        return gate, up

    def with_gradient():
        return *operands(grad=True), torch.randn(rows, columns).to(dtype)

    case_list = []
    for label, run, passes, data in (
        ("fwd", forward, 3, operands),
        ("fwd+bwd", gradients, 8, with_gradient),
    ):
        if rows == 1 and not odd and label != "fwd":
            continue
        peers = {"fastlm": ops.glu, "torch": eager} | ({} if odd else {"torch.compile": compiled})
        case_list.append(
            Case(
                f"{act} {label}" + ("" if dtype == BF16 else " fp32"),
                f"{rows} x {columns}" + (" halves" if halves else ""),
                {name: run(partial(f, act=act)) for name, f in peers.items()},
                bytes=passes * rows * columns * dtype.itemsize,
                data=data,
            )
        )
    return case_list


def shape_cases(rows: int, columns: int) -> list[Case]:
    return of_shape(rows, columns)


def cases() -> list[Case]:
    case_list = [c for shape in SHAPES for c in of_shape(*shape)]
    for dtype in (BF16, FP32):
        for rows, columns in ODD:
            if (rows, columns, "silu", False) not in SHAPES or dtype != BF16:
                case_list += of_shape(rows, columns, dtype=dtype, odd=True)
    return case_list


if __name__ == "__main__":
    main("glu", cases, shape_cases)
