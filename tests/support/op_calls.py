"""One call per op, for tests that check the same property of all ops."""

import pytest
import torch

from fastlm import ops

torch.manual_seed(0)  # at import no fixture has set it
rows, weight, head = torch.randn(4, 32), torch.randn(32), torch.randn(50, 32)
target = torch.tensor([1, 2, -100, 4])
counted = target != -100
q, k, v = (torch.randn(2, h, 8, 16) for h in (4, 2, 2))
cos, sin = torch.randn(2, 8, 16).unbind(0)
offsets, pages, lengths = torch.tensor([0, 3, 8]), torch.tensor([[0], [1]]), torch.tensor([8, 5])
quantized = ops.quantize_weight(torch.randn(24, 32), 4, symmetric=False)
caches = [t.transpose(1, 2) for t in (k, v)]


def teacher(x):
    """Not near the student. Rounded once, as autocast rounds."""
    return (3 * head[:4, :20]).to(x.dtype), head[:, :20].to(x.dtype)


# name -> (function of its float tensors, those tensors)
CALLS = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, residual=x)[0], (rows, weight)),
    "rms_norm, no weight": (lambda x: ops.rms_norm(x), (rows,)),
    "layer_norm": (
        lambda x, w, b: ops.layer_norm(x, w, b, residual=x)[0],
        (rows, weight, weight.flip(0)),
    ),
    "layer_norm, no parameters": (lambda x: ops.layer_norm(x), (rows,)),
    "rope": (lambda q, k: ops.rope(q, k, cos, sin)[0], (q, k)),
    "glu": (lambda g, u: ops.glu(g, u), (rows, rows.flip(0))),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.1),
        (rows,),
    ),
    "linear_cross_entropy": (lambda x, w: ops.linear_cross_entropy(x, w, target), (rows, head)),
    "linear_cross_entropy, rows": (
        lambda x, w: ops.linear_cross_entropy(x, w, target, reduction="none", label_smoothing=0.1),
        (rows, head),
    ),
    "linear_logprobs": (
        lambda x, w: torch.stack(
            ops.linear_logprobs(x, w, target, temperature=0.7, return_entropy=True)
        ),
        (rows, head),
    ),
    "linear_distillation": (
        lambda x, w: ops.linear_distillation(
            x, w, *teacher(x), kind="jsd", mask=counted, temperature=4.0
        ),
        (rows, head),
    ),
    "attention": (
        lambda q, k, v, sinks: ops.attention(q, k, v, causal=True, sinks=sinks),
        (q, k, v, torch.randn(4)),
    ),
    "attention, decode": (lambda q, k, v: ops.attention(q[:, :, :1], k, v), (q, k, v)),
    "varlen_attention": (
        lambda q, k, v: ops.varlen_attention(q, k, v, offsets),
        tuple(t[0].transpose(0, 1) for t in (q, k, v)),
    ),
    "paged_attention": (
        lambda q: ops.paged_attention(q, *caches, pages, lengths),
        (q.transpose(1, 2),),
    ),
    "paged_attention, int8": (
        lambda q: ops.paged_attention(
            q, *(t.to(torch.int8) for t in caches), pages, lengths, k_scale=0.1, v_scale=0.2
        ),
        (q.transpose(1, 2),),
    ),
    "quantized_linear": (lambda x: ops.quantized_linear(x, quantized), (rows,)),
    "dequantize": (lambda: quantized.dequantize(torch.bfloat16), ()),
}
each_op = pytest.mark.parametrize("function, tensors", CALLS.values(), ids=CALLS)
DIFFERENTIABLE = {n: c for n, c in CALLS.items() if "paged" not in n and n != "dequantize"}
differentiable = pytest.mark.parametrize(
    "function, tensors", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE
)


# Paths through an op that only a derivative uses.
many, classes = torch.randn(70, 8), torch.randint(0, 50, (70,))
TRANSFORMED = DIFFERENTIABLE | {
    "linear": (lambda x, w: ops.linear(x, w), (rows, head)),
    "cross_entropy, mean": (lambda x: ops.cross_entropy(x, target), (rows,)),
    "linear_cross_entropy, many": (
        lambda x, w: ops.linear_cross_entropy(x, w, classes),
        (many, head[:, :8].contiguous()),
    ),
    "linear_distillation, reverse": (
        lambda x, w: ops.linear_distillation(x, w, *teacher(x), kind="reverse", temperature=2.0),
        (rows, head),
    ),
    "attention, options": (
        lambda q, k, v, bias: ops.attention(
            q, k, v, causal=True, window=3, softcap=2.0, bias=bias, return_lse=True
        )[0],
        (q, k, v, torch.randn(4, 8, 8)),
    ),
    "varlen_attention, options": (
        lambda q, k, v, sinks, bias: ops.varlen_attention(
            q, k, v, offsets, causal=True, sinks=sinks, bias=bias
        ),
        (*(t[0].transpose(0, 1) for t in (q, k, v)), torch.randn(4), torch.randn(4, 5, 5)),
    ),
    "quantized_linear, int8": (
        lambda x: ops.quantized_linear(x, quantized, act_bits=8),
        (rows,),
    ),
}
each_transformed = pytest.mark.parametrize(
    "function, tensors", TRANSFORMED.values(), ids=TRANSFORMED
)


def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves).sum(), leaves)
