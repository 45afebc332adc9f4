"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), alone or after a residual addition."""

from torch import Tensor

from fastlm import reference
from fastlm.cuda.rms_norm import ROUND_SUPPORT
from fastlm.errors import InputError
from fastlm.operator import declare, is_autocast_on, promote
from fastlm.ops.wrong_type import TYPE_FAILURES, explain
from fastlm.reference.precision import wide_dtype


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y = F.rms_norm(x, (H,), offset + weight, eps)``.

    With `residual`: ``h = x + residual``, and ``(F.rms_norm(h, ...), h)`` is returned.

    Args:
        x: (..., H), float32, bfloat16 or float16 (float64 on the reference).
        weight: (H,), any float dtype; None: no factor, and no offset.
        eps: added to the mean square.
        residual: like x. The sum is rounded to x's dtype before it is normalised, as by two
            separate ops. Under ``torch.autocast`` x and residual are cast to the wider dtype.
        offset: 1.0 for Gemma, whose weights are stored minus one.

    Statistics and products are float32. The forward reads x (and residual) once and writes y (and
    h) once; the backward keeps h and one float32 per row.

    Raises:
        InputError: H is 0 or not the weight's size, or residual differs from x in shape, dtype or
            device.
    """
    try:
        if not x.is_floating_point():
            raise InputError(f"x: expected a float dtype, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] == 0:
            raise InputError(f"x: expected shape (..., H), H >= 1, got {tuple(x.shape)}")
        if weight is None:
            if offset:
                raise InputError(f"offset: expected 0 without a weight, got {offset}")
        elif weight.shape != x.shape[-1:]:
            raise InputError(
                f"weight: expected shape (H,) = the last dimension of x {tuple(x.shape)},"
                f" got {tuple(weight.shape)}"
            )
        elif weight.device != x.device or not weight.is_floating_point():
            raise InputError(
                f"weight: expected floats on {x.device} as x, got {weight.dtype} on {weight.device}"
            )
        if residual is not None and (
            residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device
        ):
            if residual.dtype != x.dtype and is_autocast_on(x):
                x, residual = promote(x, residual)
                return rms_norm(x, weight, eps, residual=residual, offset=offset)
            raise InputError(
                f"residual: expected {x.dtype} of shape {tuple(x.shape)} as x on {x.device},"
                f" got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
            )
        y, h, _ = _forward(x, residual, weight, eps, offset)
        return y if residual is None else (y, h)
    except TYPE_FAILURES as error:
        if isinstance(weight, int | tuple | list):  # F.rms_norm(x, (H,), weight)
            raise InputError(
                "weight: expected a tensor (H,) or None (there is no normalized_shape: the last"
                f" dimension of x is normalised), got {weight!r:.40}"
            ) from None
        raise explain(error, rms_norm, locals()) from None


def _forward_shapes(x: Tensor, residual: Tensor | None, *_):
    h = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), h, x.new_empty(x.shape[:-1], dtype=wide_dtype(x))


def _backward_shapes(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, *_
):
    dw = h.new_empty(0 if weight is None else h.shape[-1:], dtype=rstd.dtype)
    return h.new_empty(h.shape), dw


_backward = declare(
    reference.rms_norm_backward, "cpu triton", dispatch_arg="h", fake=_backward_shapes
)
_forward = declare(
    reference.rms_norm_forward,
    "cpu triton cuda",
    fake=_forward_shapes,
    outputs="y h? rstd",
    backward=_backward,
    gradients=(("x", "residual"), "weight"),
    saves={"h": lambda x, residual, h: x if residual is None else h},
    zeros_like={"dy": "h"},
)


# In a decode step, a norm before a product in int8: saves a launch and a round trip to memory.
rms_norm_round = declare(reference.rms_norm_round, "cuda", supports={"cuda": ROUND_SUPPORT})
