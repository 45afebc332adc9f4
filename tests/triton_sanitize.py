"""`make triton-sanitize`: every Triton kernel on ragged shapes under triton-viz's sanitizer.

It follows addresses as formulas and reports, with the line of the kernel, an access outside the
tensors of the launch, on any program of the grid. triton-viz 3.0 runs on Triton 3.6.0; it takes
strided tensors for faults, so all are contiguous here, and computes no values: only addresses are
checked. It has no detector of races.

    python -P tests/triton_sanitize.py [op ...]
    python -P tests/triton_sanitize.py planted     a kernel with a fault: must end with status 1
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


def _watched(function=None, **options):
    if function is None:
        return lambda f: _watched(f, **options)
    made = _jit(**options)(function) if options else _jit(function)
    return triton_viz.trace(client=Sanitizer(abort_on_error=True))(made)


triton.jit = _watched  # before the kernels are decorated

import fastlm  # noqa: E402
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


def rms_norm():
    for rows, width in [(3, 509), (1, 80), (67, 1), (2, 5000)]:
        x, residual, weight = leaves((rows, width), (rows, width), (width,))
        backward(ops.rms_norm(x, weight))
        backward(*ops.rms_norm(x, weight, residual=residual))


def rope():
    for interleaved in (False, True):
        q, k = leaves((2, 3, 7, 20), (2, 1, 7, 20))
        cos, sin = torch.zeros(2, 7, 10)
        backward(*ops.rope(q, k, cos, sin, interleaved=interleaved))


LOSSES = [
    {},
    {"reduction": "none", "label_smoothing": 0.1, "softcap": 5.0},
    {"z_loss": 0.1, "label_smoothing": 0.2, "weight": torch.ones(1009)},
]


def cross_entropy():
    for options in LOSSES:
        (logits,) = leaves((5, 1009))
        backward(ops.cross_entropy(logits, torch.tensor([0, 1008, 7, -100, 3]), **options))


def linear_cross_entropy():
    for options in LOSSES:
        x, w, bias = leaves((5, 33), (1009, 33), (1009,))
        target = torch.tensor([0, 1008, 7, -100, 3])
        backward(ops.linear_cross_entropy(x, w, target, linear_bias=bias, **options))


ATTENTION = [
    {"causal": True},
    {"window": 5, "causal": True, "softcap": 3.0, "sinks": torch.zeros(4)},
    {"alibi_slopes": torch.ones(4), "dropout_p": 0.1},
]


def attention():
    for rows, keys, d, dv in [(7, 7, 24, 24), (1, 70, 80, 40), (67, 131, 16, 16)]:
        for options in ATTENTION:
            q, k, v = leaves((2, 4, rows, d), (2, 2, keys, d), (2, 2, keys, dv))
            backward(ops.attention(q, k, v, **options))
    q, k, v = leaves((2, 4, 7, 24), (2, 2, 9, 24), (2, 2, 9, 24))
    backward(ops.attention(q, k, v, bias=torch.zeros(1, 4, 1, 9, requires_grad=True)))


def varlen_attention():
    ends = torch.tensor([0, 5, 5, 72], dtype=torch.int32)
    for options in ATTENTION:
        q, k, v = leaves((72, 4, 24), (72, 2, 24), (72, 2, 24))
        backward(ops.varlen_attention(q, k, v, ends, **options))


def paged_attention():
    for page in (1, 7, 16):
        pages = -(-50 // page)
        cache = torch.zeros(2, 2 * pages, page, 2, 24)
        block, lens = torch.arange(2 * pages).view(2, -1).int(), torch.tensor([50, 3]).int()
        ops.paged_attention(torch.zeros(2, 1, 4, 24), *cache, block, lens)
        scale = torch.ones(2, 2)
        codes = cache.to(torch.int8)
        ops.paged_attention(
            torch.zeros(2, 3, 4, 24), *codes, block, lens, k_scale=scale[0], v_scale=scale[1]
        )


def quantized_linear():
    for bits in (4, 8):
        for group, k, n in [(32, 100, 67), (-1, 131, 80)]:
            w = ops.quantize_weight(torch.randn(n, k), bits, group_size=k if group < 0 else group)
            for rows in (1, 3, 17, 70):
                for act_bits in (16, 8):
                    (x,) = leaves((rows, k))
                    backward(ops.quantized_linear(x, w, act_bits=act_bits))


def adamw():
    for options in [{}, {"state_bits": 8}, {"max_grad_norm": 1.0}]:
        weights = leaves((3, 67), (1,), (300,))
        optimizer = fastlm.AdamW(weights, **options)
        for w in weights:
            w.grad = torch.zeros_like(w)
        optimizer.step()
        optimizer.step()


OPS = {
    f.__name__: f
    for f in (
        glu, rms_norm, rope, cross_entropy, linear_cross_entropy, attention, varlen_attention,
        paged_attention, quantized_linear, adamw,
    )
}  # fmt: skip


def main() -> None:
    wanted = sys.argv[1:] or list(OPS)
    with backend.use_backend("triton"):
        for name in wanted:
            {**OPS, "planted": planted}[name]()
            print(f"triton-sanitize: {name} clean", flush=True)


if __name__ == "__main__":
    main()
