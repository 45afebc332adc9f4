"""fastlm trains, evaluates and serves small language models on its own fused kernels.

Public names load on first use, so ``fastlm --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastlm.errors import InputError

if TYPE_CHECKING:
    from fastlm import ops
    from fastlm.backend import use_backend
    from fastlm.checkpoint.config import ModelConfig
    from fastlm.hf.patching import patch, patched_ops, unpatch
    from fastlm.hf.sdpa import register_sdpa
    from fastlm.inference.engine import Engine
    from fastlm.inference.requests import Completion, Request
    from fastlm.inference.sampling import Sampling
    from fastlm.inventory import info
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.generation import generate_text
    from fastlm.muon import Muon
    from fastlm.optim import AdamW
    from fastlm.quant import QuantizedWeight, quantize
    from fastlm.tokenizer.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "AdamW", "CausalLM", "Completion", "Engine", "InputError", "ModelConfig", "Muon",
    "QuantizedWeight", "Request", "Sampling", "Tokenizer", "generate_text", "info", "ops", "patch",
    "patched_ops", "quantize", "register_sdpa", "unpatch", "use_backend",
]  # fmt: skip

# module -> its public names; "": the module itself is public
_MODULES = {
    "backend": "use_backend", "checkpoint.config": "ModelConfig", "inventory": "info",
    "hf.patching": "patch patched_ops unpatch", "hf.sdpa": "register_sdpa",
    "inference.engine": "Engine", "inference.requests": "Completion Request",
    "inference.sampling": "Sampling", "model.causal_lm": "CausalLM",
    "model.generation": "generate_text", "muon": "Muon", "ops": "", "optim": "AdamW",
    "quant": "QuantizedWeight quantize", "tokenizer.tokenizer": "Tokenizer",
}  # fmt: skip
_PUBLIC = {
    name: f"fastlm.{module}"
    for module, names in _MODULES.items()
    for name in names.split() or [module]
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    value = module if _PUBLIC[name] == f"fastlm.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
