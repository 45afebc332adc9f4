"""`make triton-sanitize`: Triton's glu on ragged shapes under triton-viz's sanitizer.

It tracks addresses as formulas and reports, with the line of the kernel, any access outside the
tensors of the launch, in any program of the grid. triton-viz 3.0 runs on Triton 3.6.0. It reports
accesses to strided tensors as faults, so all tensors here are contiguous. It computes no values:
only addresses are checked. It does not detect races. It cannot interpret the other ops' kernels: it
raises an error for constants that are dtypes, divided integers and `tl.join`. It does not check
tensors in tuples (an address 1,000,000 elements off was "clean" in paged_attention). For these
kernels, the guards around every allocation in the tests detect writes outside an output.

    python tests/support/triton_sanitize.py [op ...]
    python tests/support/triton_sanitize.py planted   a kernel with a fault: must end with status 1
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
import triton_viz
from triton_viz.clients import Sanitizer

_jit = triton.jit


def _traced_jit(function=None, **options):
    if function is None:
        return lambda f: _traced_jit(f, **options)
    kernel = _jit(**options)(function) if options else _jit(function)
    return triton_viz.trace(client=Sanitizer(abort_on_error=True))(kernel)


triton.jit = _traced_jit  # before the kernels are decorated

from fastlm import backend, ops  # noqa: E402


@triton.jit
def _planted(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + 1, mask=at < n), mask=at < n)


def planted():
    x, y = torch.zeros(100), torch.zeros(100)
    _planted[(2,)](x, y, 100, BLOCK=64)


def backward(*outputs: torch.Tensor) -> None:
    sum(t.float().sum() for t in outputs).backward()


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(s, requires_grad=True) for s in shapes]


def glu():
    for shape in [(3, 509), (1, 2049), (7,)]:
        backward(ops.glu(*leaves(shape, shape)))


OPS = {f.__name__: f for f in (glu,)}


def main() -> None:
    names = sys.argv[1:] or list(OPS)
    with backend.use_backend("triton"):
        for name in names:
            {**OPS, "planted": planted}[name]()
            print(f"triton-sanitize: {name} clean", flush=True)


if __name__ == "__main__":
    main()
