"""Linear layers for training: ``F.linear`` at a speed that does not depend on operands' addresses.

oneDNN's bfloat16 products, which torch calls, read some operands unpacked. In a training step they
take 5 to 30 % longer in one process than in the next. `csrc/cpu/linear.h` packs what it reads
twice. Where that is not faster (`_is_faster`), and always on a GPU, torch's product runs, whatever
backend is forced.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import reference
from fastlm.backend import Support, cpu_isa, forced_backend
from fastlm.cpu.linear import linear_split
from fastlm.errors import InputError
from fastlm.operator import autocast, declare, is_any_autocast_on
from fastlm.ops.glu import ACTIVATIONS, activate
from fastlm.ops.wrong_type import TYPE_FAILURES, explain
from fastlm.transforms import is_eager

# Minimum of rows with which fastlm's bfloat16 products are faster than torch's (docs/log.md), with
# and without a gradient. Where the CPU has a fast bfloat16 dot product, torch's are as fast on
# operands in the cache. Without one, or with a slow one, torch takes 2 to 4 times as long, and on
# AVX2 70 times for gradients. On AMX torch's are up to 1.2 times as fast, and float32 has MKL.
_MIN_ROWS: dict[str, tuple[float, float]] = {
    "avx512": (1024, math.inf),
    "avx512_fp16": (64, 64),  # not measured: as avx512_fma
    "avx512_fp16_emulated": (64, 64),
    "avx512_fma": (64, 64),
    "avx512f": (64, 64),
    "avx2": (1, 32),
}
# Minimum of rows with which `split_float32` splits: with fewer, splitting the weight costs too much
_MIN_SPLIT_ROWS = 256
_splits: ContextVar[bool] = ContextVar("splits", default=False)


@contextmanager
def split_float32(on: bool = True) -> Iterator[None]:
    """Make `linear` multiply float32 as three products of bfloat16 inside the ``with``.

    It does so without gradients and on a CPU with AMX. The error of a product is 5e-6 of its root
    mean square; float32's is 3e-7, bfloat16's 3e-3. A number above 3.39e38, or infinite, gives NaN.
    It is 1.2 to 2.1 times as fast as torch from 512 rows on, and slower where the other hyperthread
    uses tiles (docs/log.md). Source: csrc/cpu/linear_split.h.
    """
    token = _splits.set(on)
    try:
        yield
    finally:
        _splits.reset(token)


def uses_split_float32(x: Tensor, *weights: Tensor) -> bool:
    """Return whether `split_float32` is on and applies to these tensors."""
    return (
        _splits.get()
        and is_eager(x, *weights)
        and x.is_cpu
        and all(t.dtype == torch.float32 for t in (x, *weights))
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_grad_enabled()
        and forced_backend() in (None, "cpu")
        and cpu_isa() in ("amx", "amx_emulated")
        and x.numel() >= _MIN_SPLIT_ROWS * x.shape[-1] > 0
        and all(w.numel() > 0 for w in weights)
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: str | None = None
) -> Tensor:
    """``act(F.linear(x, weight, bias))``: x weight^T + bias, in the dtype of ``torch.autocast``
    where it is on.

    Args:
        x: (..., K), any float dtype.
        weight: (N, K), x's dtype.
        bias: (N,), x's dtype.
        act: an activation of `glu`: silu, gelu_tanh, gelu or relu2; None: none. It is computed in
            float32 and rounded once. Where no gradient is needed on a CPU, oneDNN applies it to the
            sums of the product. Elsewhere it is a pass over the product, which is stored for the
            backward.

    Sums are float32 and rounded once. On a CPU without AMX, bfloat16 products with enough rows
    (`_MIN_ROWS`) run on fastlm's kernels, which are then faster. Everything else, and everything
    under ``torch.compile``, runs on torch's, whose float32 results depend on the number of threads
    in the last bits. x is stored for the backward if weight needs a gradient, and weight if x does.
    In addition to its results the backward uses N K float32 and the packed operands.

    Raises:
        InputError: shapes or dtypes do not fit.
    """
    try:
        if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
            raise InputError(
                f"weight: expected (N, K), K = the last dimension of x {tuple(x.shape)},"
                f" got {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise InputError(
                f"bias: expected shape ({weight.shape[0]},), the rows of weight,"
                f" got {tuple(bias.shape)}"
            )
        casts = is_any_autocast_on()
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and ((t.dtype != x.dtype and not casts) or t.device != x.device):
                raise InputError(
                    f"{name}: expected {x.dtype} on {x.device} as x, got {t.dtype} on {t.device}"
                )
        if act is not None:
            return _linear_with_activation(x, weight, bias, act)
        if not torch.compiler.is_compiling() and uses_split_float32(x, weight):
            return linear_split(x, weight, bias)
        if not _is_faster(x, weight):
            return F.linear(x, weight, bias)
        if casts:
            x, weight = autocast(x, weight)
            bias = None if bias is None else autocast(bias)[0]
        return _forward(x, weight, bias)
    except TYPE_FAILURES as error:
        raise explain(error, linear, locals()) from None


# The activations that oneDNN applies to the sums of a product: its names and variants
_ONEDNN_ACTIVATIONS = {
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


def _linear_with_activation(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    if act not in ACTIVATIONS:
        raise InputError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if torch.compiler.is_compiling():  # Inductor fuses what it can see
        return reference.activation(linear(x, weight, bias), act)
    if act in _ONEDNN_ACTIVATIONS and _can_use_onednn(x, weight, bias):
        name, variant = _ONEDNN_ACTIVATIONS[act]
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], variant)
    return activate(linear(x, weight, bias), act)


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes that oneDNN multiplies: bfloat16 from AVX-512 on."""
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)


def _can_use_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether oneDNN's product with an activation runs: without a gradient, where fastlm's
    products do not run."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        is_eager(*tensors)
        and x.is_cpu
        and x.dtype in _onednn_dtypes()
        and x.numel() > 0 < weight.numel()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and forced_backend() in (None, "cpu")
        and torch.backends.mkldnn.is_available()
        and not _is_faster(x, weight)
        and not uses_split_float32(x, weight)
    )


class Linear(nn.Linear):
    """An ``nn.Linear`` that calls `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    """Return whether fastlm's products run: where they are faster, and autograd needs only a
    gradient."""
    if not is_eager(x, weight) or not x.is_cpu:
        return False
    autocast_on = torch.is_autocast_enabled("cpu")
    if (torch.get_autocast_dtype("cpu") if autocast_on else x.dtype) != torch.bfloat16:
        return False
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    min_rows = _MIN_ROWS.get(cpu_isa() or "", (math.inf, math.inf))[0 if needs_grad else 1]
    return (
        x.numel() >= min_rows * x.shape[-1] > 0
        and forced_backend()
        in (None, "cpu", "reference")  # kernels of a GPU leave products to torch
        and weight.numel() > 0
    )


def _flops(x, weight, bias, **_):
    return 2 * math.prod(x) * weight[0]


def _backward_flops(dy, x, weight, need_bias, **_):
    return sum(2 * math.prod(dy) * t[-1] for t in (x, weight) if t is not None)


def _is_supported(first: Tensor, *others) -> bool:
    return first.dtype == torch.bfloat16 and all(
        t.numel() > 0 for t in (first, *others) if isinstance(t, Tensor)
    )


_SUPPORT = {"cpu": Support("bfloat16, no empty matrix", _is_supported)}
_backward = declare(reference.linear_backward, "cpu", supports=_SUPPORT, flops=_backward_flops)
_forward = declare(
    reference.linear_forward,
    "cpu",
    supports=_SUPPORT,
    outputs="y",
    backward=_backward,
    gradients=("x", "weight", "bias"),
    saves={
        "x": lambda x, need_weight: x if need_weight else None,
        "weight": lambda weight, need_x: weight if need_x else None,
    },
    flops=_flops,
)
