"""Bits per byte of each source of held-out documents, in the same pass as that of all of them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastlm.data.shards import TokenDataset, document_offsets
from fastlm.evals.bits_per_byte import IGNORE, BitsPerByte, window, windows
from fastlm.ops import linear_logprobs
from fastlm.progress import silent

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


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
    """`fastlm.evals.bits_per_byte.evaluate` of the whole data set, and of each domain.

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
