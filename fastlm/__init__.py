"""fastlm: from raw web text to a quantized chat model, on fused kernels.

Public names load on first use, so that ``fastlm --help`` does not wait for torch.
"""

from importlib import import_module
from typing import Any

from fastlm.errors import InputError

__version__ = "0.1.0"

# name -> module that defines it
_PUBLIC = {
    "CausalLM": "fastlm.model",
    "ModelConfig": "fastlm.config",
    "ops": "fastlm.ops",
    "info": "fastlm.backend",
    "use_backend": "fastlm.backend",
}
__all__ = ["InputError", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    value = module if _PUBLIC[name] == f"fastlm.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
