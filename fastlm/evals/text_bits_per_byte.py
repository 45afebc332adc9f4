"""Bits per byte of text or shards, in total and by source, from one pass."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.data.shards import TokenDataset
from fastlm.data.texts import check_window, token_dataset
from fastlm.model.bits_per_byte import IGNORE, compressed_bits_per_byte, evaluate
from fastlm.ops import linear_logprobs
from fastlm.progress import silent
from fastlm.sources.source_files import ignore_message

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer


class _TokenLosses(nn.Module):
    """Wraps a model and stores the loss in nats of each token of `evaluate`, in order."""

    def __init__(self, model: "CausalLM") -> None:
        super().__init__()
        self.model, self.losses = model, []
        self.head, self.softcap = (
            model.head_matrix(model.dtype),
            model.config.final_logit_softcapping,
        )
        self.train(model.training)

    def forward(self, ids: Tensor, *, shift_labels: Tensor, num_items: int, **options: Any) -> Any:
        del num_items  # 1
        hidden, labels = self.model.hidden(ids, **options).flatten(0, 1), shift_labels.flatten()
        logprobs = linear_logprobs(
            hidden, self.head, labels, softcap=self.softcap, ignore_index=IGNORE
        )
        assert isinstance(logprobs, Tensor)  # a pair only with the entropy
        self.losses.append(-logprobs[labels != IGNORE].double().cpu())
        return SimpleNamespace(loss=self.losses[-1].sum())


def _by_domain(
    losses: Sequence[Tensor], dataset: TokenDataset, texts: Sequence[tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """Return bits per byte of each source of ``texts``, (text, source), from the tokens' losses."""
    names, of_document = np.unique([source for _, source in texts], return_inverse=True)
    lengths = np.diff([*dataset.document_starts(), dataset.tokens])
    token_losses = torch.cat([*losses]).numpy()
    nats = np.bincount(np.repeat(of_document, lengths), token_losses, len(names))
    sizes, tokens = (
        np.bincount(of_document, document_sizes, len(names)).astype(int)
        for document_sizes in ([len(text.encode()) for text, _ in texts], lengths)
    )
    return {
        str(name): {
            "bits_per_byte": float(nats[i] / math.log(2) / sizes[i]),
            "documents": int((of_document == i).sum()),
            "tokens": int(tokens[i]), "bytes": int(sizes[i]),
        }
        for i, name in enumerate(names)
    }  # fmt: skip


def text_bits_per_byte(
    model: "CausalLM",
    tokenizer: "Tokenizer",
    data: str | Path,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
    document_mask: bool = False,
    compressors: bool = True,
    cache: Path | None = None,
    track=silent,
    on_skip: Callable[[str], None] = ignore_message,
) -> dict[str, Any]:
    """Measure bits per byte of the text or shards at ``data``. For text the result also has xz -9e
    and zstd -19. If the documents have several sources, it has each source (``domains``).

    The default window is the model's context, at most `MAX_WINDOW`; the default stride is half
    of it. ``document_mask``: for models trained with it.
    """
    seq_len, stride = check_window(model.context_limit, seq_len, stride)
    texts: list[tuple[str, str]] = []
    options: dict[str, Any] = {"stride": stride, "document_mask": document_mask, "track": track}
    domains: dict[str, Any] = {}
    with token_dataset(
        data, tokenizer, model.config.vocab_size, cache=cache, on_skip=on_skip, collect=texts
    ) as dataset:
        packed: dict[str, Any] = {}
        if texts and compressors:
            packed = compressed_bits_per_byte(t for t, _ in texts) | {"documents": len(texts)}
        several = len({source for _, source in texts}) > 1
        evaluated = _TokenLosses(model) if several else model
        result = evaluate(evaluated, dataset, seq_len, batch_size, **options)
        if isinstance(evaluated, _TokenLosses):
            domains = _by_domain(evaluated.losses, dataset, texts)
    return {
        "bits_per_byte": result.bits_per_byte,
        **{f"bits_per_byte_{name}": packed[name] for name in ("xz", "zstd") if packed},
        "loss": result.loss, "tokens": result.tokens, "bytes": round(result.bytes),
        **({"documents": packed["documents"]} if packed else {}),
        "seq_len": seq_len, "stride": stride, **({"domains": domains} if domains else {}),
    }  # fmt: skip
