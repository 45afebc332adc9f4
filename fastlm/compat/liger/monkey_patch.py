"""Liger's ``apply_liger_kernel_to_*`` and `AutoLigerKernelForCausalLM`, on `fastlm.patch`::

    from fastlm.compat.liger import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()  # every Llama that is built from now on
    apply_liger_kernel_to_llama(model=model)  # this model

All do the same, since `fastlm.patch` looks at modules, not at names. Without ``model``, Liger
replaces classes and functions of transformers' module; here the models of that module are patched
at the end of their ``__init__``, each as its own config wants it. Models that exist stay as they
are. Attention stays as it is, as with Liger; `fastlm.patch` replaces it, too. `fastlm.unpatch`
undoes both.
"""

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from fastlm.errors import InputError
from fastlm.hf.patching import patch, patched_ops, unpatch

_PACKAGES = {"gemma3_text": "gemma3"}  # transformers' module where the name is another one
_DEFAULTS = {
    "rope": True, "cross_entropy": False, "fused_linear_cross_entropy": True, "rms_norm": True,
}  # fmt: skip
_building = 0  # models whose __init__ runs: those inside another one are patched with it


def _apply_liger_kernel_to_instance(
    model: nn.Module,
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
    _check_cross_entropy(cross_entropy)
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


def _check_cross_entropy(cross_entropy: bool) -> None:
    if cross_entropy:
        raise InputError("cross_entropy: wanted False (use fused_linear_cross_entropy), got True")


def _apply_liger_kernel_to_classes(family: str, **options: bool) -> None:
    """Patch the models that the classes of transformers' module for `family` build from now on. A
    second call replaces the options of the first.
    """
    from transformers import PreTrainedModel

    _check_cross_entropy(options["cross_entropy"])
    package = _PACKAGES.get(family, family)
    module = import_module(f"transformers.models.{package}.modeling_{package}")
    for cls in vars(module).values():
        if (
            isinstance(cls, type)
            and issubclass(cls, PreTrainedModel)
            and cls.__module__ == module.__name__
            and "__init__" in vars(cls)
        ):
            before = getattr(cls.__init__, "_fastlm_before", cls.__init__)
            cls.__init__ = _patching(before, options)


def _patching(before: Callable, options: dict[str, bool]) -> Callable:
    """The ``__init__`` `before`, after which the outermost model is patched."""

    @functools.wraps(before)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        global _building
        _building += 1
        try:
            before(self, *args, **kwargs)
        finally:
            _building -= 1
        if not _building:
            _apply_liger_kernel_to_instance(self, **options)

    setattr(__init__, "_fastlm_before", before)  # noqa: B010
    return __init__


def _function(family: str, act: str = "swiglu") -> Callable[..., None]:
    """Return Liger's function for a family, whose products are ``act``."""
    defaults = {**_DEFAULTS, act: True, "model": None}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
    )

    def apply(*args: Any, **options: Any) -> None:
        """Patch `model`, or without it every model of the family that is built from now on."""
        options = defaults | signature.bind(*args, **options).arguments
        model = options.pop("model")
        if model is None:
            _apply_liger_kernel_to_classes(family, **options)
        else:
            _apply_liger_kernel_to_instance(model, **options)

    apply.__name__ = f"apply_liger_kernel_to_{family}"
    setattr(apply, "__signature__", signature)  # noqa: B010
    return apply


apply_liger_kernel_to_llama = _function("llama")
apply_liger_kernel_to_mistral = _function("mistral")
apply_liger_kernel_to_mixtral = _function("mixtral")
apply_liger_kernel_to_qwen2 = _function("qwen2")
apply_liger_kernel_to_qwen3 = _function("qwen3")
apply_liger_kernel_to_qwen3_moe = _function("qwen3_moe")
apply_liger_kernel_to_phi3 = _function("phi3")
apply_liger_kernel_to_olmo2 = _function("olmo2")
apply_liger_kernel_to_smollm3 = _function("smollm3")
apply_liger_kernel_to_gemma = _function("gemma", "geglu")
apply_liger_kernel_to_gemma2 = _function("gemma2", "geglu")
apply_liger_kernel_to_gemma3_text = _function("gemma3_text", "geglu")


class AutoLigerKernelForCausalLM:
    """transformers' AutoModelForCausalLM, whose models are patched; arguments of both."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._patched("from_pretrained", args, kwargs)

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._patched("from_config", args, kwargs)

    @staticmethod
    def _patched(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM

        names = (*_DEFAULTS, "swiglu", "geglu")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        model = getattr(AutoModelForCausalLM, method)(*args, **kwargs)
        _apply_liger_kernel_to_instance(model, **options)
        return model
