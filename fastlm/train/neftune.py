"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the input embeddings of a fine-tuning."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


@contextmanager
def noisy_embeddings(model: "CausalLM", alpha: float, cu_seqlens: Tensor) -> Iterator[None]:
    """Return a context in which the first layer of ``model`` reads ``embeddings + noise``.

    The noise is uniform in +- ``alpha / sqrt(L * hidden_size)`` with L the number of tokens of the
    packed document (``cu_seqlens``), which other documents and padding do not change. It is drawn
    from torch's generator.
    """
    lengths, width = cu_seqlens.diff(), float(model.config.hidden_size)  # an int32 may overflow
    bounds = alpha / (lengths * width).sqrt()
    # the hook runs before the factor that Gemma has on embeddings
    bounds = bounds / model.model.embedding_scale(model.dtype)

    def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
        rows = bounds.repeat_interleave(lengths, output_size=embeddings.shape[-2])
        noise = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1)
        return embeddings + (noise * rows[:, None]).to(embeddings.dtype)

    handle = model.model.embed_tokens.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
