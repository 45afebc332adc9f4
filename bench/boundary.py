"""What it costs to carry four tensors into the extension, and through the dispatcher: the floor
under every op.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import Case, main

from fastlm import _cpu, ops


def cases() -> list[Case]:
    tensors = [torch.randn(4, 4) for _ in range(4)]
    strided = [t.t() for t in tensors]
    parameters = [torch.nn.Parameter(t) for t in tensors]
    arrays = [t.numpy() for t in tensors]
    x, weight = torch.randn(1, 16), torch.ones(16)

    def plain() -> None:
        for t in tensors:
            t.data_ptr()

    return [
        Case(
            "four tensors, bound call",
            "4 x (4, 4)",
            {"fastlm": lambda: _cpu.count_elements(*tensors), "floor: four data_ptr()": plain},
        ),
        Case(
            "four strided tensors",
            "4 x (4, 4)",
            {"fastlm": lambda: _cpu.count_elements(*strided), "floor: four data_ptr()": plain},
        ),
        Case(
            "four Parameters",
            "4 x (4, 4)",
            {"fastlm": lambda: _cpu.count_elements(*parameters), "floor: four data_ptr()": plain},
        ),
        Case(
            "four numpy arrays",
            "4 x (4, 4)",
            {"fastlm": lambda: _cpu.count_elements(*arrays), "floor: four data_ptr()": plain},
        ),
        Case(
            "whole op (rms_norm of one row)",
            "(1, 16)",
            {
                "fastlm": lambda: ops.rms_norm(x, weight),
                "torch": lambda: torch.nn.functional.rms_norm(x, (16,), weight),
            },
        ),
    ]


if __name__ == "__main__":
    main("boundary", cases)
