"""Linear layers, for training: ``F.linear`` whose products keep their speed wherever memory lies.

The library's (oneDNN through torch) bfloat16 products read some operands where they lie, and in a
training step take 5 to 30 % longer in one process than in the next; `csrc/cpu/linear.h` packs what
it reads twice. Where that does not pay, torch's product is what runs (`_own`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import backend, reference
from fastlm.backend import autocast, autocast_somewhere, register
from fastlm.backend import cpu_extension as _cpu
from fastlm.errors import InputError

# From this many rows on a step is faster with the own products (docs/log.md); on operands that lie
# in the cache torch's are up to 20 % faster below.
_ROWS = 1024
# The instruction sets on which they were measured to be. AMX has not run yet, and float32 has MKL.
_ISAS = ("avx512",)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``: x weight^T + bias, in the dtype of ``torch.autocast`` where it
    is on.

    Args:
        x: (..., K), any float dtype.
        weight: (N, K), x's dtype.
        bias: (N,), x's dtype.

    Sums are float32 and rounded once. On a CPU with bfloat16 dot products but no AMX, bfloat16
    inputs of 1024 rows or more run on fastlm's kernels, everything else on torch's. Keeps x and
    weight for the backward.

    Raises:
        InputError: shapes or dtypes do not fit.
    """
    if autocast_somewhere():
        x, weight, bias = _cast(x, weight, bias)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise InputError(
            f"weight: wanted (N, K), K = the last dimension of x {tuple(x.shape)},"
            f" got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(
            f"bias: wanted shape ({weight.shape[0]},), the rows of weight, got {tuple(bias.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise InputError(
                f"{name}: wanted {x.dtype} on {x.device} as x, got {t.dtype} on {t.device}"
            )
    if torch.compiler.is_compiling():  # rows may not be known yet: the operator decides
        own = x.is_cpu and x.dtype == torch.bfloat16
    else:
        own = x.is_cpu and _own(x)
    return _forward(x, weight, bias) if own else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` on `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if bias is None:
        x, weight = autocast(x, weight)
        return x, weight, None
    x, weight, bias = autocast(x, weight, bias)
    return x, weight, bias


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
):
    return (
        x.new_empty(x.shape if want_x else 0),
        x.new_empty(weight.shape if want_weight else 0),
        x.new_empty(weight.shape[0] if want_bias else 0),
    )


def _own(x: Tensor) -> bool:
    """Whether the own products run on x (..., K)."""
    return (
        x.dtype == torch.bfloat16
        and x.numel() >= _ROWS * x.shape[-1] > 0
        and backend.cpu_isa() in _ISAS
    )


def _matrix(t: Tensor) -> Tensor:
    """(rows, width), elements of a row side by side."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _workspace(m: int, n: int, k: int, *, weight_gradient: bool = False) -> Tensor:
    return torch.empty(_cpu.linear_workspace(m, n, k, weight_gradient) // 4 + 1)


def own_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    rows = x.numel() // k
    y = x.new_empty(*x.shape[:-1], n)
    bias = None if bias is None else bias.contiguous()
    room = _workspace(rows, n, k)
    _cpu.linear_forward(_matrix(x), _matrix(weight), bias, y.view(rows, n), room)
    return y


def own_backward(
    dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    rows = x.numel() // k
    dy, weight = _matrix(dy), _matrix(weight)
    dx = dw = db = x.new_empty(0)
    if want_x:
        dx = x.new_empty(x.shape)
        _cpu.linear_input_gradient(dy, weight, dx.view(rows, k), _workspace(rows, k, n))
    if want_weight:
        dw = x.new_empty(n, k)
        room = _workspace(rows, n, k, weight_gradient=True)
        _cpu.linear_weight_gradient(dy, _matrix(x), dw, room)
    if want_bias:
        db = dy.sum(0)
    return dx, dw, db


def _library_backward(
    dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    rows, none = math.prod(x.shape[:-1]), x.new_empty(0)
    dy = dy.reshape(rows, n)
    dx = (dy @ weight).view(x.shape) if want_x else none
    dw = dy.mT @ x.reshape(rows, k) if want_weight else none
    return dx, dw, dy.sum(0) if want_bias else none


def _cpu_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    own = _own(x) and weight.shape[0] > 0
    return (own_forward if own else F.linear)(x, weight, bias)


def _cpu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    own = _own(x) and weight.shape[0] > 0
    backward = own_backward if own else _library_backward
    return backward(dy, x, weight, want_x, want_weight, want_bias)


def _setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _autograd_backward(ctx, dy):
    wanted = ctx.needs_input_grad
    grads = _backward(dy, *ctx.saved_tensors, *wanted)
    return tuple(g if want else None for g, want in zip(grads, wanted))


_forward = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_forward_fake,
    implementations={"reference": reference.linear_forward, "cpu": _cpu_forward},
    setup_context=_setup_context,
    backward=_autograd_backward,
)
_backward = register(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool want_x, bool want_weight,"
    " bool want_bias) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    implementations={"reference": reference.linear_backward, "cpu": _cpu_backward},
    picked_by=1,
)
