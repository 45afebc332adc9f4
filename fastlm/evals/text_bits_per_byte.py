"""Bits per byte of a text or of shards, and of each of its sources in the same pass."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastlm.data.shards import TokenDataset, document_offsets
from fastlm.data.texts import check_window, token_dataset
from fastlm.model.bits_per_byte import (
    IGNORE,
    BitsPerByte,
    compressed_bits_per_byte,
    evaluate,
    window,
    windows,
)
from fastlm.ops import linear_logprobs
from fastlm.progress import silent
from fastlm.sources.rows import ignore

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer


def evaluate_domains(
    model: "CausalLM",
    dataset: TokenDataset,
    domains: Sequence[str],
    sizes: Sequence[int],
    seq_len: int,
    batch_size: int,
    *,
    stride: int,
    document_mask: bool = False,
    track: Any = silent,
) -> tuple[BitsPerByte, dict[str, dict[str, Any]]]:
    """`fastlm.model.bits_per_byte.evaluate` of the whole data set, and of each domain.

    domains, sizes: of each document, what it belongs to and its bytes of text.
    """
    names = sorted(set(domains))
    number = {name: i for i, name in enumerate(names)}
    of_document = np.array([number[domain] for domain in domains])
    lengths = np.diff([*dataset.document_starts(), dataset.tokens])
    of_token = np.repeat(of_document, lengths)
    nats = np.zeros(len(names))
    chosen = windows(dataset.tokens, seq_len, stride)
    batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    head, softcap = model.head_matrix(model.dtype), model.config.final_logit_softcapping
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in track(batches, "held-out bits per byte", unit="batches"):
            rows = [window(dataset, begin, scored, seq_len, stride) for begin, scored in batch]
            ids = torch.from_numpy(np.stack([r[0] for r in rows])).to(model.device)
            labels = torch.from_numpy(np.stack([r[1] for r in rows])).to(model.device)
            offsets = document_offsets(ids, dataset.eos_id) if document_mask else None
            hidden = model.hidden(ids, cu_seqlens=offsets)
            flat = labels.flatten()
            found = linear_logprobs(
                hidden.flatten(0, 1), head, flat, softcap=softcap, ignore_index=IGNORE
            )
            assert isinstance(found, torch.Tensor)  # a pair only with the entropy
            where = np.concatenate(
                [of_token[begin : begin + len(r[1])] for (begin, _), r in zip(batch, rows)]
            )
            kept = (flat != IGNORE).cpu().numpy()
            logprobs = found.double().cpu().numpy()[kept]
            nats -= np.bincount(where[kept], logprobs, minlength=len(names))
    model.train(was_training)
    tokens = np.bincount(of_document, lengths, minlength=len(names))
    size = np.bincount(of_document, sizes, minlength=len(names))
    bits = nats / math.log(2)
    found_by = {
        name: {
            "bits_per_byte": float(bits[i] / size[i]), "documents": int((of_document == i).sum()),
            "tokens": int(tokens[i]), "bytes": int(size[i]),
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    whole = float(bits.sum() / size.sum())
    return (
        BitsPerByte(whole, float(nats.sum() / tokens.sum()), int(tokens.sum()), float(size.sum())),
        found_by,
    )


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
    tell: Callable[[str], None] = ignore,
) -> dict[str, Any]:
    """Measure bits per byte of the text or shards at ``data``; for text also of xz -9e and zstd
    -19; and of each source, if its documents have several (``domains``).

    The default window is the model's context, at most `LONGEST_WINDOW`; the default stride is half
    of it. ``document_mask``: for models trained with it.
    """
    seq_len, stride = check_window(model.context_limit, seq_len, stride)
    texts: list[tuple[str, str]] = []
    options: dict[str, Any] = {"stride": stride, "document_mask": document_mask, "track": track}
    domains: dict[str, Any] = {}
    with token_dataset(
        data, tokenizer, model.config.vocab_size, cache=cache, tell=tell, keep=texts
    ) as dataset:
        packed: dict[str, Any] = {}
        if texts and compressors:
            packed = compressed_bits_per_byte(t for t, _ in texts) | {"documents": len(texts)}
        sources = [source for _, source in texts]
        if len(set(sources)) > 1:
            sizes = [len(text.encode()) for text, _ in texts]
            result, domains = evaluate_domains(
                model, dataset, sources, sizes, seq_len, batch_size, **options
            )
        else:
            result = evaluate(model, dataset, seq_len, batch_size, **options)
    return {
        "bits_per_byte": result.bits_per_byte,
        **{f"bits_per_byte_{name}": packed[name] for name in ("xz", "zstd") if packed},
        "loss": result.loss, "tokens": result.tokens, "bytes": round(result.bytes),
        **({"documents": packed["documents"]} if packed else {}),
        "seq_len": seq_len, "stride": stride, **({"domains": domains} if domains else {}),
    }  # fmt: skip
