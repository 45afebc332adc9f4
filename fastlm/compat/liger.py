"""Liger-Kernel's interface on `fastlm.ops` and `fastlm.patch`, on CPUs too::

    from fastlm.compat.liger import LigerCrossEntropyLoss, apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()             # each Llama that is created from now on
    apply_liger_kernel_to_llama(model=model)  # this model

Names, defaults and the names of parameters in a state_dict are those of Liger 0.8; options are
passed by keyword. As in Liger, a mean over no rows is 0 (torch's is NaN). Differences:

- A loss is float32 whatever its inputs (Liger's is bfloat16 for bfloat16 logits). Nothing is
  written in place: inputs keep their values, and a backward may run twice.
- A loss returns the loss alone: ``return_z_loss``, ``return_token_accuracy``,
  ``return_predicted_tokens`` and ``use_token_scaling`` are refused. With class weights the mean
  divides the z-loss by the rows' weights, too.
- ``in_place``, ``row_mode``, ``accum_dtype`` and ``chunk_mem_const`` have no effect: they are
  trade-offs of memory and rounding that the kernels here do not need. Sums are float32.
- ``casting_mode``: norms compute in float32 and round once, as with "gemma"; "llama" and "none"
  differ from that in the rounding of 16-bit inputs.

All ``apply_liger_kernel_to_*`` do the same, because `fastlm.patch` looks at modules, not at names.
Without ``model``, Liger replaces classes of transformers' module. Here the models of that module
are patched at the end of their ``__init__``. Existing models stay as they are. Attention is not
replaced, as with Liger; `fastlm.patch` replaces it. `fastlm.unpatch` undoes both.

Not included: norms and MLPs for one family (``LigerRMSNormForGemma``, ``LigerPhi3SwiGLUMLP``), the
losses between two distributions or on preferences, and other ops (LayerNorm, softmax, experts).
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.errors import InputError
from fastlm.hf.patching import patch, patched_ops, unpatch
from fastlm.ops import cross_entropy, glu, linear_cross_entropy, rms_norm, rope

_WITHOUT_EFFECT = ("accum_dtype", "chunk_mem_const")
_CASTING_MODES = ("llama", "gemma", "none")


def liger_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """``F.cross_entropy`` of input (N, V), plus ``lse_square_scale * lse ** 2`` per row.

    ``options`` are Liger's: ignore_index, reduction, label_smoothing, lse_square_scale, softcap.
    """
    return _loss(functools.partial(cross_entropy, input), target, weight, **options)


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`liger_cross_entropy` of ``F.linear(input, weight, bias)``, without storing the logits."""
    op = functools.partial(linear_cross_entropy, input, weight, linear_bias=bias)
    return _loss(op, target, ce_weight, **options)


def _loss(
    op: Callable[..., Any],
    target: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    for name, value in options.items():
        if name not in _WITHOUT_EFFECT and value not in (None, False):
            raise InputError(f"{name}: expected None (no kernel supports it), got {value!r:.60}")
    loss = op(
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        softcap=softcap,
        reduction="sum" if reduction == "mean" else reduction,
    )
    if reduction != "mean":
        return loss
    valid = target != ignore_index
    if weight is None:
        return loss / valid.sum().clamp(min=1)
    total = (weight.float()[torch.where(valid, target, 0)] * valid).sum()
    return loss / torch.where(valid.any(), total, 1.0)


class LigerCrossEntropyLoss(nn.Module):
    """`liger_cross_entropy` as a module: ``loss(logits, target)``."""

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.options = options

    def forward(self, _input: Tensor, target: Tensor) -> Tensor:
        return liger_cross_entropy(_input, target, self.weight, **self.options)


class LigerFusedLinearCrossEntropyLoss(LigerCrossEntropyLoss):
    """`liger_fused_linear_cross_entropy` as a module: ``loss(lin_weight, input, target, bias)``."""

    def __init__(self, ce_weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(ce_weight, **options)

    def forward(  # type: ignore[override]
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return liger_fused_linear_cross_entropy(
            _input, lin_weight, target, bias, self.weight, **self.options
        )


def liger_rms_norm(
    X: Tensor,
    W: Tensor | None,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> Tensor:
    """``F.rms_norm(X, X.shape[-1:], offset + W, eps)``; without W, without a weight."""
    if casting_mode not in _CASTING_MODES:
        raise InputError(
            f"casting_mode: expected one of {', '.join(_CASTING_MODES)}, got {casting_mode!r}"
        )
    y = rms_norm(X, W, eps, offset=0.0 if W is None else offset)
    assert isinstance(y, Tensor)  # a pair only with a residual
    return y


class LigerRMSNorm(nn.Module):
    """`liger_rms_norm` as a module with a weight."""

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
            raise InputError(f"init_fn: expected ones or zeros, got {init_fn!r}")
        initial = getattr(torch, init_fn)(hidden_size) if elementwise_affine else None
        self.register_parameter("weight", None if initial is None else nn.Parameter(initial))
        self.variance_epsilon, self.offset, self.casting_mode = eps, offset, casting_mode

    def forward(self, hidden_states: Tensor) -> Tensor:
        return liger_rms_norm(
            hidden_states, self.weight, self.variance_epsilon, self.offset, self.casting_mode
        )


def liger_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """`fastlm.ops.rope`, half-split: q (B, H, S, D) and k (B, Hkv, S, D) rotated.

    cos and sin: (S, R), (1, S, R) or (B, S, R), or with one more dimension of size 1 at
    unsqueeze_dim. position_ids is not read, as in Liger: the tables already belong to the
    positions.
    """
    cos, sin = (t.squeeze(unsqueeze_dim) if t.dim() == 4 else t for t in (cos, sin))
    return rope(q, k, cos, sin)


liger_rope = liger_rotary_pos_emb  # its name in Liger's functional module


def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    """``F.silu(a) * b``."""
    return glu(a, b, act="silu")


def liger_geglu(a: Tensor, b: Tensor) -> Tensor:
    """``F.gelu(a, approximate="tanh") * b``."""
    return glu(a, b, act="gelu_tanh")


class LigerGEGLUMLP(nn.Module):
    """``down_proj(gelu_tanh(gate_proj(x)) * up_proj(x))`` with config's sizes, for any
    ``hidden_act``."""

    product = staticmethod(liger_geglu)

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__()
        width, inner = config.hidden_size, intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.product(self.gate_proj(x), self.up_proj(x)))


class LigerSwiGLUMLP(LigerGEGLUMLP):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` with the sizes in config."""

    product = staticmethod(liger_swiglu)

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        if config.hidden_act not in ("silu", "swish"):
            raise InputError(
                f"config.hidden_act: expected silu or swish, got {config.hidden_act!r}"
            )
        super().__init__(config, intermediate_size)


_PATCHES = {  # Liger's option -> the op of `fastlm.patch`
    "rope": "rope",
    "rms_norm": "rms_norm",
    "swiglu": "glu",
    "geglu": "glu",
    "fused_linear_cross_entropy": "linear_cross_entropy",
}


def _ops(options: dict[str, bool]) -> set[str]:
    """Return the ops of `fastlm.patch` that Liger's options enable."""
    if options.pop("cross_entropy", False):
        raise InputError("cross_entropy: expected False (use fused_linear_cross_entropy), got True")
    if unknown := sorted(options.keys() - _PATCHES):
        raise InputError(f"options: expected some of {', '.join(_PATCHES)}, got {unknown[0]}")
    return {*_PATCHES.values()} - {_PATCHES[name] for name, on in options.items() if not on}


def _patch_model(model: nn.Module, ops: set[str]) -> None:
    """Patch the modules of `model` that `fastlm.patch` recognises for `ops`; errors as there."""
    if recognised_ops := [op for op in patched_ops(patch(model)) if op in ops]:
        patch(model, ops=recognised_ops)
    else:
        unpatch(model)


_open_inits = 0  # models with a running __init__: a model inside another is patched with it


def _patch_classes(package: str, ops: set[str]) -> None:
    """Patch all future models of the classes in transformers' module for `package`.

    A second call replaces the choice of the first.
    """
    from transformers import PreTrainedModel

    module = import_module(f"transformers.models.{package}.modeling_{package}")
    for cls in vars(module).values():
        if (
            isinstance(cls, type)
            and issubclass(cls, PreTrainedModel)
            and cls.__module__ == module.__name__
            and "__init__" in vars(cls)
        ):
            original = getattr(cls.__init__, "_fastlm_original", cls.__init__)
            cls.__init__ = _patch_after_init(original, ops)


def _patch_after_init(original: Callable, ops: set[str]) -> Callable:
    """Wrap an ``__init__`` so that the outermost model is patched after it."""

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        global _open_inits
        _open_inits += 1
        try:
            original(self, *args, **kwargs)
        finally:
            _open_inits -= 1
        if not _open_inits:
            _patch_model(self, ops)

    setattr(__init__, "_fastlm_original", original)  # noqa: B010
    return __init__


def _apply_to(package: str) -> Callable[..., None]:
    """Return Liger's function for the models of transformers' `package`."""

    def apply(*, model: nn.Module | None = None, **options: bool) -> None:
        """Patch `model`, or without it every model of the family that is created from now on.

        ``options``: rope, rms_norm, swiglu or geglu, fused_linear_cross_entropy; True by default.
        """
        if model is None:
            _patch_classes(package, _ops(options))
        else:
            _patch_model(model, _ops(options))

    return apply


apply_liger_kernel_to_llama = _apply_to("llama")
apply_liger_kernel_to_mistral = _apply_to("mistral")
apply_liger_kernel_to_mixtral = _apply_to("mixtral")
apply_liger_kernel_to_qwen2 = _apply_to("qwen2")
apply_liger_kernel_to_qwen3 = _apply_to("qwen3")
apply_liger_kernel_to_qwen3_moe = _apply_to("qwen3_moe")
apply_liger_kernel_to_phi3 = _apply_to("phi3")
apply_liger_kernel_to_olmo2 = _apply_to("olmo2")
apply_liger_kernel_to_smollm3 = _apply_to("smollm3")
apply_liger_kernel_to_gemma = _apply_to("gemma")
apply_liger_kernel_to_gemma2 = _apply_to("gemma2")
apply_liger_kernel_to_gemma3_text = _apply_to("gemma3")


class AutoLigerKernelForCausalLM:
    """transformers' AutoModelForCausalLM with patched models. It takes the arguments of both."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        from transformers import AutoModelForCausalLM

        options = {
            name: kwargs.pop(name) for name in (*_PATCHES, "cross_entropy") if name in kwargs
        }
        model = AutoModelForCausalLM.from_pretrained(*args, **kwargs)
        _patch_model(model, _ops(options))
        return model
