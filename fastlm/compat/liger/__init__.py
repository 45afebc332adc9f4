"""Liger-Kernel's losses, norms, rotation and MLPs by its names, on `fastlm.ops`, CPUs included::

    from fastlm.compat.liger import LigerCrossEntropyLoss, LigerRMSNorm, LigerSwiGLUMLP

Arguments, defaults and the names of parameters in a state_dict are those of Liger 0.8. As in Liger,
a mean over no rows is 0 (torch's is NaN), and the mean of a z-loss counts rows whatever their
weights. Differences:

- A loss is float32 whatever its inputs (Liger's is bfloat16 for bfloat16 logits). Nothing is
  written in place: inputs keep their values, and a backward may run twice.
- ``in_place``, ``row_mode``, ``accum_dtype`` and ``chunk_mem_const`` have no effect: they
  trade memory and rounding costs that the kernels here do not have. Sums are float32.
- ``casting_mode``: norms compute in float32 and round once, as with "gemma"; "llama" and "none"
  differ from that in the rounding of 16-bit inputs.
- Predicted tokens and token accuracy cost a pass over the logits. With a fused loss they cost its
  product again, in blocks of rows; so does ``use_token_scaling``.

For a whole Hugging Face model use `fastlm.patch`, or Liger's ``apply_liger_kernel_to_*``, which
call it (`fastlm.compat.liger.monkey_patch`). Not included: Liger's losses between two
distributions or on preferences, and its kernels for other ops (LayerNorm, softmax, experts).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.compat.liger.monkey_patch import (
    AutoLigerKernelForCausalLM,
    _apply_liger_kernel_to_instance,
    apply_liger_kernel_to_gemma,
    apply_liger_kernel_to_gemma2,
    apply_liger_kernel_to_gemma3_text,
    apply_liger_kernel_to_llama,
    apply_liger_kernel_to_mistral,
    apply_liger_kernel_to_mixtral,
    apply_liger_kernel_to_olmo2,
    apply_liger_kernel_to_phi3,
    apply_liger_kernel_to_qwen2,
    apply_liger_kernel_to_qwen3,
    apply_liger_kernel_to_qwen3_moe,
    apply_liger_kernel_to_smollm3,
)
from fastlm.compat.liger.rms_norm import (
    LigerFusedAddRMSNorm,
    LigerRMSNorm,
    LigerRMSNormForGemma,
    LigerRMSNormForGemma2,
    LigerRMSNormForGemma3,
    LigerRMSNormForGlm4,
    LigerRMSNormForOlmo2,
    liger_fused_add_rms_norm,
    liger_rms_norm,
)
from fastlm.errors import InputError
from fastlm.ops import cross_entropy, glu, linear_cross_entropy, rope
from fastlm.ops.cross_entropy import check_options

__all__ = [
    "AutoLigerKernelForCausalLM",
    "CrossEntropyOutput",
    "LigerCrossEntropyLoss",
    "LigerFusedAddRMSNorm",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerPhi3SwiGLUMLP",
    "LigerRMSNorm",
    "LigerRMSNormForGemma",
    "LigerRMSNormForGemma2",
    "LigerRMSNormForGemma3",
    "LigerRMSNormForGlm4",
    "LigerRMSNormForOlmo2",
    "LigerSwiGLUMLP",
    "_apply_liger_kernel_to_instance",
    "apply_liger_kernel_to_gemma",
    "apply_liger_kernel_to_gemma2",
    "apply_liger_kernel_to_gemma3_text",
    "apply_liger_kernel_to_llama",
    "apply_liger_kernel_to_mistral",
    "apply_liger_kernel_to_mixtral",
    "apply_liger_kernel_to_olmo2",
    "apply_liger_kernel_to_phi3",
    "apply_liger_kernel_to_qwen2",
    "apply_liger_kernel_to_qwen3",
    "apply_liger_kernel_to_qwen3_moe",
    "apply_liger_kernel_to_smollm3",
    "liger_cross_entropy",
    "liger_fused_add_rms_norm",
    "liger_fused_linear_cross_entropy",
    "liger_geglu",
    "liger_rms_norm",
    "liger_rope",
    "liger_rotary_pos_emb",
    "liger_swiglu",
]

_BLOCK_ROWS = 256  # rows of logits at a time to predict tokens: 64 MB for 128 k bfloat16 classes


@dataclass
class CrossEntropyOutput:
    """What a loss returns when more than the loss is requested."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """``F.cross_entropy`` of input (N, V), plus ``lse_square_scale * lse ** 2`` per row.

    Returns the loss, or a `CrossEntropyOutput` where any of three extras is requested: the part of
    the loss that is z-loss, the share of rows whose largest logit is the target's (one number per
    row for reduction "none"), or the class of the largest logit (-1 where ignored).
    """
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            raise InputError(f"{name}: wanted None (reduction says it), got {value}")
    return _loss(
        partial(cross_entropy, input, target),
        lambda: input.argmax(-1),
        target, weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
        return_z_loss, return_token_accuracy, return_predicted_tokens, False,
    )  # fmt: skip


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """`liger_cross_entropy` of ``F.linear(input, weight, bias)``, whose logits are never stored.

    use_token_scaling: multiply each row's loss by the probability of its target, a constant.
    """
    return _loss(
        partial(linear_cross_entropy, input, weight, target, linear_bias=bias),
        lambda: _largest(input, weight, bias),
        target, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
        return_z_loss, return_token_accuracy, return_predicted_tokens, use_token_scaling,
    )  # fmt: skip


class _Loss(nn.Module):
    """``function`` with the options of ``names`` as a module; they become its attributes."""

    function: Callable[..., Tensor | CrossEntropyOutput]
    names: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        parameters = inspect.signature(cls.function).parameters
        cls.__signature__ = inspect.Signature([parameters[name] for name in cls.names])

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        bound = self.__signature__.bind(*args, **options)
        bound.apply_defaults()
        (weight, tensor), *rest = bound.arguments.items()
        self.register_buffer(weight, tensor, persistent=False)
        for name, value in rest:
            setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.names}


_NUMBERS = "ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap"
_EXTRAS = "return_token_accuracy", "return_predicted_tokens"


class LigerCrossEntropyLoss(_Loss):
    """`liger_cross_entropy` as a module: ``loss(logits, target)``."""

    function = staticmethod(liger_cross_entropy)
    names = "weight", *_NUMBERS, "return_z_loss", *_EXTRAS

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        return liger_cross_entropy(_input, target, **self._options())


class LigerFusedLinearCrossEntropyLoss(_Loss):
    """`liger_fused_linear_cross_entropy` as a module: ``loss(lin_weight, input, target, bias)``."""

    function = staticmethod(liger_fused_linear_cross_entropy)
    names = "ce_weight", *_NUMBERS, "return_z_loss", "accum_dtype", "use_token_scaling", *_EXTRAS

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        return liger_fused_linear_cross_entropy(_input, lin_weight, target, bias, **self._options())


def liger_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastlm.ops.rope`, half-split: q (B, H, S, D) and k (B, Hkv, S, D) rotated.

    cos and sin: (S, R), (1, S, R) or (B, S, R), or with one more dimension of size 1 at
    unsqueeze_dim. position_ids is not read, as in Liger: the tables already belong to the
    positions. rotary_dim: number of rotated elements per head, where the tables hold every angle
    once (width rotary_dim / 2) or are wider.
    """
    if rotary_dim is not None and not (
        0 < rotary_dim <= q.shape[-1] and rotary_dim % 2 == 0 and rotary_dim <= 2 * cos.shape[-1]
    ):
        raise InputError(
            f"rotary_dim: wanted even, at most D = {q.shape[-1]} and twice the tables'"
            f" {cos.shape[-1]}, got {rotary_dim}"
        )
    tables = []
    for table in (cos, sin):
        if table.dim() == 4:
            table = table.squeeze(unsqueeze_dim)
        if rotary_dim is not None:
            half = table[..., : rotary_dim // 2]
            table = torch.cat((half, half), -1)
        tables.append(table)
    return rope(q, k, *tables, rotary_dim=rotary_dim)


def liger_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """`liger_rotary_pos_emb` under its name in Liger's functional module."""
    return liger_rotary_pos_emb(q, k, cos, sin, position_ids, unsqueeze_dim)


def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    """``F.silu(a) * b``."""
    return glu(a, b, act="silu")


def liger_geglu(a: Tensor, b: Tensor) -> Tensor:
    """``F.gelu(a, approximate="tanh") * b``."""
    return glu(a, b, act="gelu_tanh")


class _MLP(nn.Module):
    product: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.product(self.gate_proj(x), self.up_proj(x)))


class LigerSwiGLUMLP(_MLP):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` with the sizes in config."""

    product = staticmethod(liger_swiglu)

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        if config.hidden_act not in ("silu", "swish"):
            raise InputError(f"config.hidden_act: wanted silu or swish, got {config.hidden_act!r}")
        super().__init__(config, intermediate_size)


class LigerPhi3SwiGLUMLP(nn.Module):
    """`LigerSwiGLUMLP` whose gate and up are one projection, as in Phi-3."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.hidden_act not in ("silu", "swish"):
            raise InputError(f"config.hidden_act: wanted silu or swish, got {config.hidden_act!r}")
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.gate_up_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, -1)
        return self.down_proj(liger_swiglu(gate, up))


class LigerGEGLUMLP(_MLP):
    """``down_proj(gelu_tanh(gate_proj(x)) * up_proj(x))`` with config's sizes, whatever its act."""

    product = staticmethod(liger_geglu)

    def __init__(self, config: Any) -> None:
        super().__init__(config)


def _loss(
    run: Callable[..., Any],
    predict: Callable[[], Tensor],
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    lse_square_scale: float,
    label_smoothing: float,
    reduction: str,
    softcap: float | None,
    return_z_loss: bool,
    return_token_accuracy: bool,
    return_predicted_tokens: bool,
    use_token_scaling: bool,
) -> Tensor | CrossEntropyOutput:
    """`run` is the op with its tensors; `predict` returns the class of each row's largest logit."""
    check_options(softcap, reduction, None)
    options: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap}
    # the op would divide the z-loss by the rows' weights, too
    apart = return_z_loss or bool(lse_square_scale and weight is not None and reduction == "mean")
    by_row = reduction == "none" or use_token_scaling
    loss = run(
        weight=weight, label_smoothing=label_smoothing, reduction="none" if by_row else "sum",
        z_loss=0.0 if apart else lse_square_scale, return_lse=apart, **options,
    )  # fmt: skip
    valid = target != ignore_index
    z_loss = None
    if apart:
        loss, lse = loss
        z_loss = lse_square_scale * torch.where(valid, lse, 0.0).square()
    if use_token_scaling:
        with torch.no_grad():
            probability = run(reduction="none", **options).neg().exp()
        loss = loss * probability
        z_loss = None if z_loss is None else z_loss * probability
    rows = valid.sum().clamp(min=1)
    if reduction != "none":
        loss = loss.sum()
        z_loss = None if z_loss is None else z_loss.sum()
    if reduction == "mean":
        total = rows
        if weight is not None:  # looked up after the op has refused targets out of range
            seen = weight.float()[torch.where(valid, target, 0)] * valid
            total = torch.where(valid.any(), seen.sum(), 1.0)
        loss = loss / total
        z_loss = None if z_loss is None else z_loss / rows
    if z_loss is not None:
        loss = loss + z_loss
    if not (return_z_loss or return_token_accuracy or return_predicted_tokens):
        return loss
    output = CrossEntropyOutput(loss, z_loss if return_z_loss else None)
    if return_token_accuracy or return_predicted_tokens:
        with torch.no_grad():
            predicted = torch.where(valid, predict(), -1)
        if return_predicted_tokens:
            output.predicted_tokens = predicted
        if return_token_accuracy:
            hits = ((predicted == target) & valid).float()
            output.token_accuracy = hits if reduction == "none" else hits.sum() / rows
    return output


def _largest(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(input.dtype)
    rows = input.reshape(-1, input.shape[-1]).split(_BLOCK_ROWS)
    classes = [F.linear(block, weight, bias).argmax(-1) for block in rows]
    return torch.cat(classes).view(input.shape[:-1])
