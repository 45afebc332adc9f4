"""Liger's norms by their names and defaults, on `fastlm.ops.rms_norm`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.errors import InputError
from fastlm.ops import rms_norm

_CASTING_MODES = ("llama", "gemma", "none")


def liger_rms_norm(
    X: Tensor,
    W: Tensor | None,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> Tensor:
    """``F.rms_norm(X, X.shape[-1:], offset + W, eps)``; without W, no weight at all."""
    _check_casting(casting_mode)
    y = rms_norm(X, W, eps, offset=0.0 if W is None else offset)
    assert isinstance(y, Tensor)  # a pair only with a residual
    return y


def liger_fused_add_rms_norm(
    X: Tensor,
    R: Tensor,
    W: Tensor,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> tuple[Tensor, Tensor]:
    """``S = X + R``: (`liger_rms_norm` of S, S)."""
    _check_casting(casting_mode)
    y = rms_norm(X, W, eps, residual=R, offset=offset)
    assert isinstance(y, tuple)  # a lone tensor only without a residual
    return y


def _check_casting(mode: str) -> None:
    if mode not in _CASTING_MODES:
        raise InputError(f"casting_mode: wanted one of {', '.join(_CASTING_MODES)}, got {mode!r}")


class LigerRMSNorm(nn.Module):
    """`liger_rms_norm` with a weight of its own."""

    weight: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        if init_fn not in ("ones", "zeros"):
            raise InputError(f"init_fn: wanted ones or zeros, got {init_fn!r}")
        initial = getattr(torch, init_fn)(hidden_size) if elementwise_affine else None
        self.register_parameter("weight", None if initial is None else nn.Parameter(initial))
        self.elementwise_affine = elementwise_affine
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place
        self.row_mode = row_mode

    def forward(self, hidden_states: Tensor) -> Tensor:
        return liger_rms_norm(
            hidden_states, self.weight, self.variance_epsilon, self.offset, self.casting_mode
        )

    def extra_repr(self) -> str:
        shape = None if self.weight is None else tuple(self.weight.shape)
        return f"weight_shape={shape}, eps={self.variance_epsilon}, offset={self.offset}"


def _init(*without: str, size: str = "hidden_size", **defaults: Any) -> Callable[..., None]:
    """Return `LigerRMSNorm.__init__` with other defaults, ``without`` some parameters."""
    names = inspect.signature(LigerRMSNorm.__init__).parameters.items()
    signature = inspect.Signature([
        p.replace(
            name=size if name == "hidden_size" else name, default=defaults.get(name, p.default)
        )
        for name, p in names
        if name not in ("elementwise_affine", *without)
    ])  # fmt: skip

    def __init__(*args: Any, **options: Any) -> None:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        LigerRMSNorm.__init__(*bound.args)

    setattr(__init__, "__signature__", signature)  # noqa: B010
    return __init__


_GEMMA = {"offset": 1.0, "casting_mode": "gemma", "init_fn": "zeros"}


class LigerRMSNormForGemma(LigerRMSNorm):
    __init__ = _init(**_GEMMA)


class LigerRMSNormForGemma2(LigerRMSNorm):
    __init__ = _init(**_GEMMA, in_place=False)


class LigerRMSNormForGemma3(LigerRMSNorm):
    __init__ = _init("row_mode", size="dim", **_GEMMA, in_place=False)


class LigerRMSNormForOlmo2(LigerRMSNorm):
    __init__ = _init(in_place=False)


class LigerRMSNormForGlm4(LigerRMSNormForOlmo2):
    pass


class LigerFusedAddRMSNorm(LigerRMSNorm):
    """`liger_fused_add_rms_norm` with a weight of its own: ``norm(x, residual)`` is a pair."""

    __init__ = _init("row_mode", in_place=False)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        assert self.weight is not None  # None only without elementwise_affine
        return liger_fused_add_rms_norm(
            hidden_states, residual, self.weight, self.variance_epsilon, self.offset,
            self.casting_mode,
        )  # fmt: skip
