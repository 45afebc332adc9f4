"""fastlm: from raw web text to a quantized chat model, on fused kernels."""

from fastlm.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError"]
