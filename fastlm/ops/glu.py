"""Gated linear units (Shazeer 2020, arXiv:2002.05202): SwiGLU and GeGLU without intermediates.

The backward recomputes the activation from `gate` instead of storing it: at two to three
multiply-adds per byte moved, the arithmetic is free and the memory is not.
"""

from torch import Tensor

from fastlm import reference
from fastlm.backend import Support
from fastlm.errors import InputError
from fastlm.operator import declare, is_autocast_on, promote
from fastlm.ops.wrong_type import TYPE_FAILURES, explain

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu2")


def glu(gate: Tensor, up: Tensor, *, act: str = "silu") -> Tensor:
    """``F.silu(gate) * up``, or with ``F.gelu(gate, approximate="tanh")`` (`gelu_tanh`),
    ``F.gelu(gate)`` (`gelu`) or ``F.relu(gate) ** 2`` (`relu2`: So et al. 2021, arXiv:2109.08668).

    Args:
        gate: (..., F), float32, bfloat16 or float16 (float64 on the reference). The halves of one
            fused projection, ``x.chunk(2, -1)``, are read without a copy.
        up: shape and dtype of gate. Under ``torch.autocast`` both are cast to the wider dtype.
        act: silu, gelu_tanh, gelu or relu2.

    Computed in float32 and rounded once. The forward reads 2 and writes 1 element per result. The
    backward reads 3, writes 2 and keeps only gate and up.

    Raises:
        InputError: gate and up differ in shape, dtype or device; act is not one of the four.
    """
    try:
        if act not in ACTIVATIONS:
            raise InputError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")
        if not gate.is_floating_point():
            raise InputError(f"gate: expected a float dtype, got {gate.dtype}")
        if (
            up.shape != gate.shape
            or up.dtype != gate.dtype
            or not ((up.is_cpu and gate.is_cpu) or up.device == gate.device)
        ):
            if up.dtype != gate.dtype and is_autocast_on(gate):
                return glu(*promote(gate, up), act=act)
            raise InputError(
                f"up: expected {gate.dtype} {tuple(gate.shape)} on {gate.device} as gate,"
                f" got {up.dtype} {tuple(up.shape)} on {up.device}"
            )
        return _forward(gate, up, act)
    except TYPE_FAILURES as error:
        raise explain(error, glu, locals()) from None


def activate(x: Tensor, act: str) -> Tensor:
    """Return act(x): `glu` without `up`, for `fastlm.ops.linear`."""
    return _forward(x, None, act)


_CUDA = {"cuda": Support("gate and up", lambda gate, up, act: up is not None)}
_backward = declare(
    reference.glu_backward,
    "cpu triton",
    dispatch_arg="gate",
    fake=lambda dy, gate, up, act: (
        gate.new_empty(gate.shape),
        gate.new_empty(0 if up is None else gate.shape),
    ),
)
_forward = declare(
    reference.glu_forward,
    "cpu triton cuda",
    supports=_CUDA,
    fake=lambda gate, up, act: gate.new_empty(gate.shape),
    outputs="y",
    backward=_backward,
    gradients=("gate", "up"),
)
# In a decode step, a gate before a product in int8: saves a launch and a round trip to memory.
glu_round = declare(reference.glu_round, "cuda")
