"""Time AdamW against torch's fused, foreach and loop variants.

The cases are 40 M parameters in 100 tensors, and small or odd tensors, where the overhead of the
call shows. Its states of 8 bits are beside bitsandbytes's, if that is installed.
"""

from importlib.util import find_spec

import bench_path  # noqa: F401
import torch
from harness import Case, main
from torch.nn.utils import clip_grad_norm_

from fastlm import AdamW

BIG = [(400, 1000)] * 100
SMALL = [(64, 64), (64,)] * 100
ODD = [(509, 1021), (1021,), (3, 80), (1,)] * 3


def tensors(shapes, dtype, grad_dtype):
    params = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    for p in params:
        p.grad_dtype = None
        p.grad = (torch.randn(p.shape) * 0.01).to(grad_dtype)
    return params


def torch_step(shapes, dtype=torch.float32, **options):
    return torch.optim.AdamW(tensors(shapes, dtype, dtype), **options).step


def bitsandbytes_step(shapes):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(tensors(shapes, torch.float32, torch.float32)).step


def clip_step_copy():
    """The step of a bf16 model with fp32 weights in torch: clip bf16 gradients, step, copy back."""
    low = tensors(BIG, torch.bfloat16, torch.bfloat16)
    wide = [p.detach().float().requires_grad_() for p in low]
    optimizer = torch.optim.AdamW(wide, fused=True)

    def step():
        clip_grad_norm_(low, 1.0)
        for w, p in zip(wide, low):
            w.grad = p.grad.float()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(low, wide)

    return step


def clip_step_copy_fp32_gradients():
    """The same step with float32 gradients: only the clip, the fused step and the copy."""
    low = [torch.randn(s).bfloat16() for s in BIG]
    wide = tensors(BIG, torch.float32, torch.float32)
    optimizer = torch.optim.AdamW(wide, fused=True)

    def step():
        clip_grad_norm_(wide, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(low, wide)

    return step


def mine(shapes, dtype, grad_dtype, **options):
    """A variant with its own tensors, because the step changes them."""
    return lambda: AdamW(tensors(shapes, dtype, grad_dtype), **options).step


def case(
    name: str, shape: str, variants: dict, bytes_per_parameter: int, shapes: list, **more
) -> Case:
    """Return a case that reads and writes `bytes_per_parameter` bytes per parameter."""
    size = bytes_per_parameter * sum(torch.Size(s).numel() for s in shapes)
    return Case(name, shape, variants, bytes=size, data=tuple, **more)


def eight_bits() -> Case:
    """Steps of float32 weights with states of 8 bits: 16 bytes each, of which the states are 4."""
    variants, missing = {"fastlm": mine(BIG, torch.float32, torch.float32, state_bits=8)}, {}
    if find_spec("bitsandbytes"):
        variants["bitsandbytes"] = lambda: bitsandbytes_step(BIG)
    else:
        missing["bitsandbytes"] = "not installed"
    return case("step with 8-bit states", "40 M fp32", variants, 16, BIG, missing=missing)


def cases() -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    master = {"master_weights": True, "max_grad_norm": 1.0}
    return [
        case(
            "step",
            "40 M fp32",
            {
                "fastlm": mine(BIG, fp32, fp32),
                "torch fused": lambda: torch_step(BIG, fused=True),
                "torch foreach": lambda: torch_step(BIG, foreach=True),
                "torch loop": lambda: torch_step(BIG, foreach=False),
            },
            28,
            BIG,
        ),
        case(
            "clip + step + bf16 copy",
            "40 M",
            {
                "fastlm": mine(BIG, bf16, bf16, **master),
                "fastlm 8-bit": mine(BIG, bf16, bf16, **master, state_bits=8),
                "fastlm stochastic": mine(
                    BIG, bf16, bf16, max_grad_norm=1.0, stochastic_rounding=True
                ),
                "fastlm fp32 gradients": mine(BIG, bf16, fp32, **master),
                "torch fused": clip_step_copy,
                "torch fused with fp32 gradients": clip_step_copy_fp32_gradients,
            },
            30,
            BIG,
        ),
        eight_bits(),
        case(
            "step",
            "200 tensors, 0.4 M fp32",
            {
                "fastlm": mine(SMALL, fp32, fp32),
                "torch fused": lambda: torch_step(SMALL, fused=True),
                "torch foreach": lambda: torch_step(SMALL, foreach=True),
            },
            28,
            SMALL,
        ),
        *(
            case(
                f"step {kind}",
                shape,
                {
                    "fastlm": mine(shapes, dtype, dtype),
                    "torch fused": lambda shapes=shapes, dtype=dtype: torch_step(
                        shapes, dtype, fused=True
                    ),
                },
                20 + 2 * dtype.itemsize,
                shapes,
            )
            for shape, shapes in (("12 odd tensors, 1.6 M", ODD), ("1 element", [(1,)]))
            for kind, dtype in (("fp32", fp32), ("bf16", bf16))
        ),
    ]


if __name__ == "__main__":
    main("optim", cases)
