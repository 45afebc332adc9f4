"""The cost of quantization: size, and the distance between a model and its quantized form on
held-out text.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.data.shards import TokenDataset
from fastlm.model.bits_per_byte import IGNORE, window, windows
from fastlm.model.quantized_modules import QuantizedEmbedding, QuantizedLinear
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.progress import silent
from fastlm.stats.intervals import ratio_error

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

_ROWS = 512  # rows of logits of both models in memory: 200 MB in float32 at 50,000 words


@dataclass(frozen=True)
class ModelComparison:
    """The comparison of a model and its quantized form on one text.

    Attributes:
        bits_per_byte_before, bits_per_byte: the original's and the quantized model's.
        kl: mean of KL(original || quantized) of the next token, in nats.
        greedy_agreement: share of the positions where both have the same likeliest next token.
        tokens: number of compared tokens.
        windows: bits per byte of the original and of the quantized model in each window.
    """

    bits_per_byte_before: float
    bits_per_byte: float
    kl: float
    greedy_agreement: float
    tokens: int
    windows: Sequence[tuple[float, float]]

    @property
    def bpb_increase(self) -> float:
        """Return the increase in bits per byte, as a share of the original's."""
        return self.bits_per_byte / self.bits_per_byte_before - 1

    def metrics(self) -> dict[str, Any]:
        """Return all fields but the windows, and "bpb_increase_error", the standard error of
        `bpb_increase` over the windows.
        """
        fields = {name: value for name, value in asdict(self).items() if name != "windows"}
        return {**fields, "bpb_increase_error": ratio_error(self.windows)}


@torch.no_grad()
def compare_models(
    before: "CausalLM",
    after: "CausalLM",
    dataset: TokenDataset,
    *,
    seq_len: int,
    stride: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    track=silent,
) -> ModelComparison:
    """Compare two models of one vocabulary on `dataset`, window by window as
    `fastlm.model.bits_per_byte.evaluate` cuts them. ``max_tokens``: compare evenly
    spaced windows of about this many tokens.
    """
    selected = windows(dataset.tokens, seq_len, stride)
    if max_tokens is not None:
        selected = selected[:: max(1, math.ceil(dataset.tokens / max_tokens))]
    kl, same, tokens = 0.0, 0, 0
    nats: list[Tensor] = []  # of each batch, (windows, 2): the original, the quantized model
    batches = [selected[i : i + batch_size] for i in range(0, len(selected), batch_size)]
    for batch in track(batches, "compare with the original", unit="batches"):
        cut = [window(dataset, begin, scored, seq_len, stride) for begin, scored in batch]
        ids = torch.from_numpy(np.stack([inputs for inputs, _ in cut])).to(before.device)
        labels = torch.from_numpy(np.stack([labels for _, labels in cut])).flatten()
        positions = (labels != IGNORE).nonzero()[:, 0]
        nats.append(torch.zeros(len(cut), 2, dtype=torch.float64))
        hidden = [m.hidden(ids).flatten(0, 1) for m in (before, after)]
        for rows in positions.split(_ROWS):
            p, q = (
                torch.log_softmax(_logits(m, h[rows]), 1) for h, m in zip(hidden, (before, after))
            )
            target = labels[rows, None].to(p.device)
            both = torch.cat((p.gather(1, target), q.gather(1, target)), 1).double().cpu()
            nats[-1].index_add_(0, rows // ids.shape[1], both, alpha=-1)
            same += int((p.argmax(1) == q.argmax(1)).sum())
            kl += float((p.exp() * (p - q)).sum())
        tokens += len(positions)
    bits = math.log(2) * dataset.bytes_of_text * (tokens / dataset.tokens)
    window_nats = torch.cat(nats)
    before_bits, after_bits = (window_nats.sum(0) / bits).tolist()
    window_bits = [(a, b) for a, b in (window_nats * (len(window_nats) / bits)).tolist()]
    return ModelComparison(before_bits, after_bits, kl / tokens, same / tokens, tokens, window_bits)


def _logits(model: "CausalLM", hidden: Tensor) -> Tensor:
    """Return logits (N, V) in float32, not rounded to the model's dtype, as `fastlm.evals` does. A
    quantized head rounds its activations as usual.
    """
    head = model.head_weight
    if isinstance(head, QuantizedWeight):
        return model.logits(hidden.float())
    logits = F.linear(hidden.float(), head.float())
    cap = model.config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def effective_bits(model: nn.Module) -> dict[str, float]:
    """Return the stored bits per weight, scales and offsets included: "bits_per_weight" of the full
    model (norms, biases and unquantized matrices included) and "bits_per_quantized_weight" of the
    quantized matrices alone. Shared weights count once.
    """
    seen: set[int] = set()
    bits = weights = quantized_bits = quantized = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            if module.qdata.data_ptr() not in seen:
                seen.add(module.qdata.data_ptr())
                quantized_bits += 8 * module.weight.nbytes
                quantized += math.prod(module.weight.shape)
    for parameter in model.parameters():
        bits += 8 * parameter.nbytes
        weights += parameter.numel()
    return {
        "bits_per_weight": (bits + quantized_bits) / max(weights + quantized, 1),
        "bits_per_quantized_weight": quantized_bits / max(quantized, 1),
    }
