"""Quantized weights, modules that hold them, and `quantize`, which puts them into any torch
model.
"""

from fastlm.quant.model import load_quantized, quantization_config, quantize
from fastlm.quant.modules import QuantizedEmbedding, QuantizedLinear
from fastlm.quant.weight import QuantizedWeight

__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "load_quantized",
    "quantization_config",
    "quantize",
]
