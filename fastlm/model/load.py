"""Load a model together with its tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

from fastlm.checkpoint.gguf_file import open_gguf
from fastlm.model.causal_lm import CausalLM
from fastlm.sources.packages import model_path
from fastlm.tokenizer.load import load_tokenizer
from fastlm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


def load_model(
    path: str | Path,
    act_bits: int | None = None,
    *,
    keep_quantized: bool = True,
    dtype: "torch.dtype | None" = None,
) -> tuple[CausalLM, Tokenizer]:
    """Load the model and its tokenizer at ``path``, or from a package (``model:smollm2``). The
    options are those of `CausalLM.from_pretrained`.
    """
    path = model_path(path)  # verifies the checksum of a package's file, once
    gguf_file = open_gguf(path) if path.suffix == ".gguf" else None  # cached: it is parsed once
    model = CausalLM.from_pretrained(
        path, act_bits=act_bits, keep_quantized=keep_quantized, dtype=dtype
    )
    tokenizer = load_tokenizer(path, model.config.to_dict())
    del gguf_file
    return model, tokenizer
