"""LayerNorm (Ba, Kiros and Hinton 2016, arXiv:1607.06450), alone or after a residual addition."""

from torch import Tensor

from fastlm import reference
from fastlm.errors import InputError
from fastlm.operator import declare, is_autocast_on, promote
from fastlm.ops.wrong_type import TYPE_FAILURES, explain


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y = F.layer_norm(x, (H,), weight, bias, eps)``.

    With `residual`: ``h = x + residual``, and ``(F.layer_norm(h, ...), h)`` is returned.

    Args:
        x: (..., H), float32, bfloat16 or float16 (float64 on the reference).
        weight: (H,), any float dtype; None: no factor.
        bias: likewise; None: nothing is added.
        eps: added to the variance.
        residual: like x. The sum is rounded to x's dtype before it is normalised, as by two
            separate ops. Under ``torch.autocast`` x and residual are cast to the wider dtype.

    Statistics and products are float32. The variance is summed around the mean, so that a large
    mean does not cancel it. The forward reads x (and residual) once and writes y (and h) once; the
    backward keeps h and two float32 per row.

    Raises:
        InputError: H is 0 or not the size of weight or bias, or residual differs from x in shape,
            dtype or device.
    """
    try:
        width = x.shape[-1:]
        if not x.is_floating_point() or not width or width[0] == 0:
            raise InputError(f"x: expected floats (..., H), H >= 1, got {x.dtype} {tuple(x.shape)}")
        if weight is not None and (
            weight.shape != width or weight.device != x.device or not weight.is_floating_point()
        ):
            raise _parameter_error("weight", weight, x)
        if bias is not None and (
            bias.shape != width or bias.device != x.device or not bias.is_floating_point()
        ):
            raise _parameter_error("bias", bias, x)
        if residual is not None and (
            residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device
        ):
            if residual.dtype != x.dtype and is_autocast_on(x):
                x, residual = promote(x, residual)
                return layer_norm(x, weight, bias, eps, residual=residual)
            raise InputError(
                f"residual: expected {x.dtype} {tuple(x.shape)} on {x.device} as x,"
                f" got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
            )
        y, h, _, _ = _forward(x, residual, weight, bias, eps)
        return y if residual is None else (y, h)
    except TYPE_FAILURES as error:
        if isinstance(weight, int | tuple | list):  # F.layer_norm(x, (H,), weight)
            raise InputError(
                "weight: expected a tensor (H,) or None (there is no normalized_shape: the last"
                f" dimension of x is normalised), got {weight!r:.40}"
            ) from None
        raise explain(error, layer_norm, locals()) from None


def _parameter_error(name: str, parameter: Tensor, x: Tensor) -> InputError:
    return InputError(
        f"{name}: expected floats ({x.shape[-1]},) on {x.device} as x {tuple(x.shape)},"
        f" got {parameter.dtype} {tuple(parameter.shape)} on {parameter.device}"
    )


_backward = declare(reference.layer_norm_backward, "cpu triton", dispatch_arg="h")
_forward = declare(
    reference.layer_norm_forward,
    "cpu triton",
    outputs="y h? mean rstd",
    backward=_backward,
    gradients=(("x", "residual"), "weight", "bias"),
    saves={"h": lambda x, residual, h: x if residual is None else h},
    zeros_like={"dy": "h"},
)
