"""Held-out bits per byte: how well a model compresses unseen text, independent of its tokenizer.

    bits_per_byte = sum of -log2 p(token | tokens before) / bytes of the text

Every token is predicted once, also end-of-text tokens (which count as bits, not as bytes). Windows
overlap: only the last ``stride`` tokens of a window of ``seq_len`` are scored; the tokens before
them are context. xz and zstd on the same text are the baselines; they need not encode the document
boundaries.
"""

import lzma
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from torch import nn

from fastlm.data.shards import TokenDataset, document_offsets
from fastlm.errors import InputError
from fastlm.model.causal_lm import IGNORE
from fastlm.progress import silent


@dataclass(frozen=True)
class BitsPerByte:
    """The result of `evaluate`. ``loss``: nats per token. ``bytes``: the size of the text of
    ``tokens``."""

    bits_per_byte: float
    loss: float
    tokens: int
    bytes: float


def windows(tokens: int, seq_len: int, stride: int) -> list[tuple[int, int]]:
    """Return (begin, first scored) of windows ``tokens[begin : begin + seq_len]``. Together they
    score each token once.

    The last window begins earlier than its stride, so that all windows have ``seq_len`` tokens (or
    there is only one).
    """
    result, scored = [], 0
    while scored < tokens:
        end = min(scored + (seq_len if scored == 0 else stride), tokens)
        result.append((max(end - seq_len, 0), scored))
        scored = end
    return result


def evaluate(
    model: nn.Module,
    dataset: TokenDataset,
    seq_len: int,
    batch_size: int,
    *,
    stride: int | None = None,
    max_tokens: int | None = None,
    document_mask: bool = False,
    track=silent,
) -> BitsPerByte:
    """Evaluate the complete data set, or evenly spaced windows of about ``max_tokens`` tokens in
    total.

    ``stride`` defaults to ``seq_len``: no overlap. With ``max_tokens``, the number of bytes is
    estimated from the average bytes per token. With ``document_mask``, the context of a token ends
    where its document begins (`fastlm.data.shards.document_offsets`).
    """
    stride = seq_len if stride is None else stride
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: expected 1 or more, got {value}")
    if not 1 <= stride <= seq_len:
        raise InputError(f"stride: expected 1 to seq_len = {seq_len}, got {stride}")
    scored_windows = windows(dataset.tokens, seq_len, stride)
    if max_tokens is not None:
        scored_windows = scored_windows[:: max(1, math.ceil(dataset.tokens / max_tokens))]
    device = next(model.parameters()).device
    nats, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        starts = range(0, len(scored_windows), batch_size)
        batches = [scored_windows[i : i + batch_size] for i in starts]
        for batch in track(batches, "held-out bits per byte", unit="batches"):
            rows = [window(dataset, begin, scored, seq_len, stride) for begin, scored in batch]
            ids = torch.from_numpy(np.stack([r[0] for r in rows])).to(device)
            labels = torch.from_numpy(np.stack([r[1] for r in rows])).to(device)
            offsets = document_offsets(ids, dataset.eos_id) if document_mask else None
            options = {} if offsets is None else {"cu_seqlens": offsets}
            nats += float(model(ids, shift_labels=labels, num_items=1, **options).loss)
            tokens += int((labels != IGNORE).sum())
    model.train(was_training)
    size = dataset.bytes_of_text * (tokens / dataset.tokens)
    return BitsPerByte(nats / math.log(2) / size, nats / tokens, tokens, size)


def window(
    dataset: TokenDataset, begin: int, scored: int, seq_len: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and labels (length,). The first token of the data set is predicted from
    end-of-text.
    """
    length = min(seq_len, dataset.tokens)
    labels = dataset.read(begin, length)
    first = dataset.read(begin - 1, 1) if begin else np.array([dataset.eos_id])
    inputs = np.concatenate([first, labels[:-1]])
    labels[: scored - begin] = IGNORE
    return inputs, labels


def compressed_bits_per_byte(texts: Iterable[str]) -> dict[str, float]:
    """Return 8 * compressed / original bytes of the joined texts for ``xz -9e`` and
    ``zstd -19``.
    """
    data = b"".join(text.encode() for text in texts)
    if not data:
        raise InputError("texts: expected at least one byte of text, got none")
    sizes = {
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "zstd": len(zstandard.ZstdCompressor(level=19).compress(data)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}
