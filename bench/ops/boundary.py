"""Time passing four tensors into the extension, directly and through the dispatcher.

This is the lower bound for every op.
"""

from functools import partial

import bench_path  # noqa: F401
import torch
from harness import Case, main

from fastlm import _cpu, ops


def tensors() -> list[torch.Tensor]:
    return [torch.randn(4, 4) for _ in range(4)]


def carried(*operands):
    return partial(_cpu.count_elements, *operands)


def four_pointers(*_):
    plain = tensors()

    def call() -> None:
        for t in plain:
            t.data_ptr()

    return call


def cases() -> list[Case]:
    kinds = {
        "four tensors, bound call": tensors,
        "four strided tensors": lambda: [t.t() for t in tensors()],
        "four Parameters": lambda: [torch.nn.Parameter(t) for t in tensors()],
        "four numpy arrays": lambda: [t.numpy() for t in tensors()],
    }
    variants = {"fastlm": carried, "floor: four data_ptr()": four_pointers}
    op_variants = {
        "fastlm": lambda x, weight: lambda: ops.rms_norm(x, weight),
        "torch": lambda x, weight: lambda: torch.nn.functional.rms_norm(x, (16,), weight),
    }
    return [
        *(Case(name, "4 x (4, 4)", variants, data=make) for name, make in kinds.items()),
        Case(
            "whole op (rms_norm of one row)",
            "(1, 16)",
            op_variants,
            data=lambda: (torch.randn(1, 16), torch.ones(16)),
        ),
    ]


if __name__ == "__main__":
    main("boundary", cases)
