"""Quantized weights, modules that hold them, and `quantize`, which puts them into any torch
model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm.ops.quantized_weight import QuantizedWeight
    from fastlm.quant.model import load_quantized, quantization_config, quantize
    from fastlm.quant.modules import QuantizedEmbedding, QuantizedLinear

__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "load_quantized",
    "quantization_config",
    "quantize",
]
_MODULES = {
    "QuantizedEmbedding": "fastlm.quant.modules", "QuantizedLinear": "fastlm.quant.modules",
    "QuantizedWeight": "fastlm.ops.quantized_weight", "load_quantized": "fastlm.quant.model",
    "quantization_config": "fastlm.quant.model", "quantize": "fastlm.quant.model",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import torch on first use of these names: the stage in this package does not need it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
