"""Attention against torch's SDPA.

FLOPs by the field's convention: 4 B H S T D, half of it under a causal mask, 2.5 times for the
backward. Decoding is counted in bytes of keys and values read once.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import Case, main

from fastlm import ops

TRAINING = [  # (B, H, Hkv, S, D), dtype; the first two are the rows of the targets
    ((8, 8, 8, 512, 64), torch.bfloat16),
    ((1, 16, 16, 2048, 128), torch.bfloat16),
    ((8, 8, 8, 512, 64), torch.float32),
    ((1, 16, 16, 2048, 128), torch.float32),
    ((4, 9, 3, 507, 64), torch.bfloat16),  # SmolLM2's heads, ragged
    ((2, 4, 4, 252, 80), torch.bfloat16),
    # odd: three heads of 80, primes, one key head for many, a lone token
    *(
        (shape, dtype)
        for shape in [
            (1, 3, 3, 127, 80),
            (3, 5, 1, 509, 96),
            (2, 3, 3, 1021, 128),
            (1, 3, 1, 1, 80),
        ]
        for dtype in (torch.bfloat16, torch.float32)
    ),
]
DECODING = [(1, 9, 3, t, 64) for t in (64, 512, 1024, 4096)] + [(4, 32, 8, 1024, 128)]
# odd: a lone key, three heads of 80, groups of 7 and of 71 query heads
ODD_DECODING = [(1, 3, 3, 1, 80), (1, 3, 3, 127, 80), (3, 14, 2, 509, 64), (1, 71, 1, 257, 64)]


def cases() -> list[Case]:
    return [
        *(c for shape, dtype in TRAINING for c in _training(shape, dtype)),
        *(
            _decoding(shape, dtype)
            for shape in DECODING + ODD_DECODING
            for dtype in (torch.bfloat16, torch.float32)
        ),
        *(_paged(shape) for shape in [*DECODING, (3, 3, 3, 509, 80)]),
        *(_full((2, 3, 3, 509, 80), dtype) for dtype in (torch.bfloat16, torch.float32)),
        _varlen([37, 512, 1024, 200, 3, 800, 1024, 496], 8, 64),
        _varlen([1, 127, 251, 509], 3, 80),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _training(shape: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
    b, h, hkv, s, d = shape
    q, k, v = (torch.randn(b, n, s, d, dtype=dtype, requires_grad=True) for n in (h, hkv, hkv))
    dout = torch.randn(b, h, s, d, dtype=dtype)
    flops = 4 * b * h * s * s * d / 2
    calls = {
        "fastlm": lambda: ops.attention(q, k, v, causal=True),
        "torch": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=h != hkv
        ),
    }

    def forward(call):
        def run():
            with torch.no_grad():
                call()

        return run

    def both(call):
        return lambda: torch.autograd.grad(call(), (q, k, v), dout)

    name = f"causal {_short(dtype)}"
    dims = f"({b}, {h}/{hkv}, {s}, {d})"
    return [
        Case(f"{name} forward", dims, {n: forward(c) for n, c in calls.items()}, flops,
             dtype=_short(dtype)),
        Case(f"{name} forward+backward", dims, {n: both(c) for n, c in calls.items()}, 3.5 * flops,
             dtype=_short(dtype)),
    ]  # fmt: skip


def _full(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """Without a mask, as an encoder."""
    b, h, hkv, s, d = shape
    q, k, v = (torch.randn(b, n, s, d, dtype=dtype) for n in (h, hkv, hkv))
    calls = {
        "fastlm": lambda: ops.attention(q, k, v),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    return Case(f"full {_short(dtype)} forward", f"({b}, {h}/{hkv}, {s}, {d})",
                {n: _inference(c) for n, c in calls.items()}, 4 * b * h * s * s * d,
                dtype=_short(dtype))  # fmt: skip


def _inference(call):
    def run():
        with torch.inference_mode():
            call()

    return run


def _decoding(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    b, h, hkv, t, d = shape
    q = torch.randn(b, h, 1, d, dtype=dtype)
    k, v = (torch.randn(b, hkv, t, d, dtype=dtype) for _ in range(2))
    calls = {
        "fastlm": lambda: ops.attention(q, k, v, causal=True),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }
    variants = {n: _inference(c) for n, c in calls.items()}
    size = 2 * k.numel() * k.element_size()
    return Case(f"decode {_short(dtype)}", f"({b}, {h}/{hkv}, 1 x {t}, {d})", variants, bytes=size)


def _paged(shape: tuple[int, ...]) -> Case:
    """A cache in pages of 16, bf16 and int8; torch, without paged attention on a CPU, gathers."""
    b, h, hkv, t, d = shape
    q = torch.randn(b, 1, h, d, dtype=torch.bfloat16)
    pages = b * -(-t // 16)
    k, v = (torch.randn(pages, 16, hkv, d, dtype=torch.bfloat16) for _ in range(2))
    k8, v8 = (t.mul(30).clamp(-127, 127).to(torch.int8) for t in (k, v))
    table = torch.randperm(pages).int().view(b, -1)
    lens = torch.full((b,), t, dtype=torch.int32)

    def gather():
        keys, values = (x[table].flatten(1, 2)[:, :t].transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True)

    calls = {
        "fastlm": lambda: ops.paged_attention(q, k, v, table, lens, causal=True),
        "fastlm int8": lambda: ops.paged_attention(
            q, k8, v8, table, lens, causal=True, k_scale=1 / 30, v_scale=1 / 30
        ),
        "torch gather": gather,
    }
    variants = {n: _inference(c) for n, c in calls.items()}
    return Case(
        "paged decode bf16", f"({b}, {h}/{hkv}, 1 x {t}, {d})", variants, bytes=4 * k.numel()
    )


def _varlen(lengths: list[int], h: int, d: int) -> Case:
    """Documents packed one after the other; torch pads them to the longest."""
    q, k, v = (
        torch.randn(sum(lengths), h, d, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    dout = torch.randn_like(q)
    padded = [
        torch.nn.utils.rnn.pad_sequence(t.detach().split(lengths), batch_first=True)
        .transpose(1, 2)
        .requires_grad_()
        for t in (q, k, v)
    ]
    padded_dout = torch.randn_like(padded[0])
    calls = {
        "fastlm": lambda: torch.autograd.grad(
            ops.varlen_attention(q, k, v, offsets, causal=True), (q, k, v), dout
        ),
        "torch padded": lambda: torch.autograd.grad(
            F.scaled_dot_product_attention(*padded, is_causal=True), padded, padded_dout
        ),
    }
    flops = 3.5 * sum(4 * h * n * n * d / 2 for n in lengths)
    return Case(
        "varlen causal bf16 forward+backward",
        f"{len(lengths)} in {sum(lengths)}, {h} heads of {d}",
        calls,
        flops,
    )


if __name__ == "__main__":
    main("attention", cases)
