"""Load a model together with its tokenizer."""

from pathlib import Path

import torch

from fastlm import backend
from fastlm.checkpoint.gguf_file import open_gguf
from fastlm.model.causal_lm import CausalLM
from fastlm.pipeline.run_folder import locate_model
from fastlm.sources.packages import model_path
from fastlm.tokenizer.load import load_tokenizer
from fastlm.tokenizer.tokenizer import Tokenizer


def load_model(
    path: str | Path,
    act_bits: int | None = None,
    *,
    keep_quantized: bool = True,
    dtype: torch.dtype | None = None,
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


def load_for_inference(path: str | Path, act_bits: int | None = None) -> tuple[CausalLM, Tokenizer]:
    """Load as `load_model` does, to generate text: a GGUF file whose matrices are all quantized has
    bfloat16 activations where the CPU multiplies it, unless ``act_bits`` is 16.

    Such a file states no dtype. On Zen 4, prompts of SmolLM2 are computed 1.05 to 1.2 times as fast
    with the same perplexity (docs/log). `load_model` keeps float32, so that what is exported or
    evaluated does not depend on the machine.
    """
    path = locate_model(model_path(path))
    model, tokenizer = load_model(path, act_bits)
    if path.suffix == ".gguf" and act_bits != 16 and backend.multiplies_bf16():
        if all(p.dim() < 2 for p in model.parameters()):
            model.bfloat16()
    return model, tokenizer
