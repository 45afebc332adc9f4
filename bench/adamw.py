"""AdamW against torch's fused, foreach and loop variants: 40 M parameters as 100 tensors, and small
or odd tensors, where the cost of the call shows."""

import sys
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import Case, main

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


def torch_step(shapes, **options):
    optimizer = torch.optim.AdamW(tensors(shapes, torch.float32, torch.float32), **options)
    return optimizer.step


def clip_step_copy():
    """What a bf16 model with fp32 weights does in torch: clip bf16 gradients, step, copy back."""
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
    """The same with the gradients already float32: nothing but clip, fused step and copy."""
    low = [torch.randn(s).bfloat16() for s in BIG]
    wide = tensors(BIG, torch.float32, torch.float32)
    optimizer = torch.optim.AdamW(wide, fused=True)

    def step():
        clip_grad_norm_(wide, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(low, wide)

    return step


def cases() -> list[Case]:
    n = sum(torch.Size(s).numel() for s in BIG)
    fp32, bf16 = torch.float32, torch.bfloat16
    step = Case(
        "step",
        "40 M fp32",
        {
            "fastlm": AdamW(tensors(BIG, fp32, fp32)).step,
            "torch fused": torch_step(BIG, fused=True),
            "torch foreach": torch_step(BIG, foreach=True),
            "torch loop": torch_step(BIG, foreach=False),
        },
        bytes=28 * n,
    )
    master = {"master_weights": True, "max_grad_norm": 1.0}
    whole = Case(
        "clip + step + bf16 copy",
        "40 M",
        {
            "fastlm": AdamW(tensors(BIG, bf16, bf16), **master).step,
            "fastlm 8-bit": AdamW(tensors(BIG, bf16, bf16), **master, state_bits=8).step,
            "fastlm stochastic": AdamW(
                tensors(BIG, bf16, bf16), max_grad_norm=1.0, stochastic_rounding=True
            ).step,
            "fastlm fp32 gradients": AdamW(tensors(BIG, bf16, fp32), **master).step,
            "torch fused": clip_step_copy(),
            "torch fused, fp32 gradients": clip_step_copy_fp32_gradients(),
        },
        bytes=30 * n,
    )
    small = Case(
        "step",
        "200 tensors, 0.4 M fp32",
        {
            "fastlm": AdamW(tensors(SMALL, fp32, fp32)).step,
            "torch fused": torch_step(SMALL, fused=True),
            "torch foreach": torch_step(SMALL, foreach=True),
        },
        bytes=28 * sum(torch.Size(s).numel() for s in SMALL),
    )
    odd = [
        Case(
            f"step {kind}",
            shape,
            {
                "fastlm": AdamW(tensors(shapes, dtype, dtype)).step,
                "torch fused": torch.optim.AdamW(tensors(shapes, dtype, dtype), fused=True).step,
            },
            bytes=(20 + 2 * dtype.itemsize) * sum(torch.Size(s).numel() for s in shapes),
        )
        for shape, shapes in (("12 odd tensors, 1.6 M", ODD), ("1 element", [(1,)]))
        for kind, dtype in (("fp32", fp32), ("bf16", bf16))
    ]
    return [step, whole, small, *odd]


if __name__ == "__main__":
    main("optim", cases)
