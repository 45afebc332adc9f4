"""Quantized weights, modules that hold them, and `quantize`, which puts them into any torch
model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm.model.quantized_modules import (
        QuantizedEmbedding,
        QuantizedLinear,
        load_quantized,
        quantization_config,
    )
    from fastlm.ops.quantized_weight import QuantizedWeight
    from fastlm.quant.model import quantize

__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "load_quantized",
    "quantization_config",
    "quantize",
]
_MODULES = {
    "QuantizedEmbedding": "fastlm.model.quantized_modules",
    "QuantizedLinear": "fastlm.model.quantized_modules",
    "QuantizedWeight": "fastlm.ops.quantized_weight",
    "load_quantized": "fastlm.model.quantized_modules",
    "quantization_config": "fastlm.model.quantized_modules",
    "quantize": "fastlm.quant.model",
}


def __getattr__(name: str) -> Any:
    """Import torch on first use of these names: the stage in this package does not need it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
