"""Liger's ``apply_liger_kernel_to_*`` as aliases of `fastlm.patch`, for an existing model::

    from fastlm.compat.liger import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)

All do the same, since `fastlm.patch` looks at modules, not at names. Without ``model`` Liger
changes transformers' classes for the whole process; here ``model`` is required. Attention stays as
it is, as with Liger; `fastlm.patch` replaces it, too. `fastlm.unpatch` undoes both.
"""

from torch import nn

from fastlm.errors import InputError
from fastlm.hf.patching import patch, patched_ops, unpatch


def _apply_liger_kernel_to_instance(
    model: nn.Module | None,
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    geglu: bool = True,
) -> None:
    """Patch the ops that are True, where `model` has a place for them.

    Raises:
        InputError: as `fastlm.patch`; cross_entropy is True (the fused loss has no logits for it).
    """
    if model is None:
        raise InputError("model: wanted one (classes of transformers stay as they are), got None")
    if cross_entropy:
        raise InputError("cross_entropy: wanted False (use fused_linear_cross_entropy), got True")
    wanted = {
        "rope": rope, "rms_norm": rms_norm, "glu": swiglu and geglu,
        "linear_cross_entropy": fused_linear_cross_entropy,
    }  # fmt: skip
    found = patched_ops(patch(model))
    ops = [op for op in found if wanted.get(op)]
    if ops:
        patch(model, ops=ops)
    else:
        unpatch(model)


def apply_liger_kernel_to_llama(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
) -> None:
    """`_apply_liger_kernel_to_instance` with Liger's order of arguments."""
    _apply_liger_kernel_to_instance(
        model, rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu=swiglu
    )


def apply_liger_kernel_to_gemma(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    geglu: bool = True,
    model: nn.Module | None = None,
) -> None:
    """`_apply_liger_kernel_to_instance` with Liger's order of arguments."""
    _apply_liger_kernel_to_instance(
        model, rope, cross_entropy, fused_linear_cross_entropy, rms_norm, geglu=geglu
    )


apply_liger_kernel_to_mistral = apply_liger_kernel_to_llama
apply_liger_kernel_to_mixtral = apply_liger_kernel_to_llama
apply_liger_kernel_to_qwen2 = apply_liger_kernel_to_llama
apply_liger_kernel_to_qwen3 = apply_liger_kernel_to_llama
apply_liger_kernel_to_qwen3_moe = apply_liger_kernel_to_llama
apply_liger_kernel_to_phi3 = apply_liger_kernel_to_llama
apply_liger_kernel_to_olmo2 = apply_liger_kernel_to_llama
apply_liger_kernel_to_smollm3 = apply_liger_kernel_to_llama
apply_liger_kernel_to_gemma2 = apply_liger_kernel_to_gemma
apply_liger_kernel_to_gemma3_text = apply_liger_kernel_to_gemma
