"""Sample the next tokens of a step, each with the options of its own sequence.

Logits on the CPU go to C++ in one call for all rows (csrc/cpu/decode). Elsewhere, and where that is
not built, torch computes the same (`fastlm.inference.sampling`, which is the definition). Both draw
the token at which the sum of probabilities exceeds the same random number.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm import backend
from fastlm.inference.requests import TokenLogprob
from fastlm.inference.sampling import LogitsProcessor, Sampling


class SamplerOptions:
    """How the tokens of one sequence are sampled.

    sampling: temperature, filters and penalties.
    logits_processor: applies the penalties of this sequence (a `LogitsProcessor` of one row).
    stop_ids: tokens that end the sequence.
    vocab: ids from it on are not drawn.
    """

    def __init__(
        self,
        sampling: Sampling,
        logits_processor: LogitsProcessor | None,
        stop_ids: frozenset[int],
        vocab: int,
    ):
        self.sampling, self.logits_processor, self.vocab = sampling, logits_processor, vocab
        self.stop_ids = sorted(token for token in stop_ids if token < vocab)
        self._cpp: Any = None

    @property
    def cpp(self) -> Any:
        """The same options in C++, which point into the tensors of ``logits_processor``."""
        if self._cpp is None:
            s, p = self.sampling, self.logits_processor
            mask, counts, bias = (None,) * 3 if p is None else (p.repetition_mask, p.counts, p.bias)
            self._cpp = backend.cpu_extension.TokenSampler(
                vocab=self.vocab,
                temperature=s.temperature,
                top_k=s.top_k or 0,
                top_p=-1.0 if s.top_p is None else s.top_p,
                min_p=-1.0 if s.min_p is None else s.min_p,
                repetition_penalty=s.repetition_penalty,
                presence_penalty=s.presence_penalty,
                frequency_penalty=s.frequency_penalty,
                ends=self.stop_ids,
                repetition_mask=mask,
                counts=counts,
                bias=bias,
            )
        return self._cpp


class SamplerInput(NamedTuple):
    """A token to sample from row ``row`` of logits.

    mask: (any size) bool, the tokens that a grammar allows.
    can_stop: whether a stop token may be drawn.
    logprobs: the number of most likely tokens to report; None: no log-probabilities.
    """

    row: int
    options: SamplerOptions
    generator: torch.Generator
    mask: Tensor | None = None
    can_stop: bool = True
    logprobs: int | None = None


class SampledToken(NamedTuple):
    """A sampled token. ``token`` is -1 where the logits are not finite: one is NaN, or no token may
    be drawn."""

    token: int
    logprob: TokenLogprob | None


class Sampler:
    """Samples tokens from the logits of steps. It serves one thread at a time."""

    def __init__(self) -> None:
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._draw = torch.empty(1, dtype=torch.float64, device="cpu")

    def sample(self, logits: Tensor, rows: Sequence[SamplerInput]) -> list[SampledToken]:
        """Sample a token for each of ``rows`` from (L, V) logits.

        The result of a row is batch-invariant where logits are on the CPU."""
        logits = logits.float()
        if (
            not logits.is_cpu
            or backend.forced_backend() not in (None, "cpu")
            or backend.unavailable_reason("cpu")
        ):
            return sample_with_torch(logits, rows)
        torch.get_num_threads()  # passes torch's number of threads to OpenMP
        size = backend.cpu_extension.sample_workspace(logits.shape[1])
        if self._workspace.numel() < size:
            self._workspace = torch.empty(size, dtype=torch.uint8)
        inputs = [
            (
                row,
                options.cpp,
                # the number that torch.rand of one float64 draws
                self._draw.uniform_(generator=generator).item()
                if options.sampling.temperature
                else 0.0,
                mask,
                can_stop,
                -1 if logprobs is None else logprobs,
            )
            for row, options, generator, mask, can_stop, logprobs in rows
        ]
        sampled = backend.cpu_extension.sample(logits, inputs, self._workspace)
        return [
            SampledToken(token, None if row.logprobs is None else TokenLogprob(token, logprob, top))
            for row, (token, logprob, top) in zip(rows, sampled, strict=True)
        ]


def sample_with_torch(logits: Tensor, rows: Sequence[SamplerInput]) -> list[SampledToken]:
    """Compute `Sampler.sample` with torch operators, on any device. Rows with the same options are
    sampled together, where their bits do not depend on that."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        is_plain = row.options.logits_processor is None and row.mask is None and row.can_stop
        sampling = row.options.sampling
        can_group = is_plain and sampling.is_row_invariant
        groups.setdefault((sampling, row.options.vocab) if can_group else i, []).append(i)
    sampled: list[SampledToken | None] = [None] * len(rows)
    for indices in groups.values():
        group = [rows[i] for i in indices]
        options = group[0].options
        group_logits = logits[[row.row for row in group], : options.vocab]
        if len(group) == 1:
            group_logits = allowed_logits(group_logits, group[0])
        tokens = options.sampling.sample(group_logits, [row.generator for row in group])
        finite = group_logits.amax(-1).isfinite().tolist()  # False: all are -inf, or one is NaN
        for i, row, row_logits, token, is_finite in zip(
            indices, group, group_logits, tokens.tolist(), finite, strict=True
        ):
            logprob = None
            if is_finite and row.logprobs is not None:
                scaled = row_logits[None] / (options.sampling.temperature or 1.0)
                logprob = token_logprob(scaled, token, row.logprobs)
            sampled[i] = SampledToken(token if is_finite else -1, logprob)
    return [token for token in sampled if token is not None]


def allowed_logits(logits: Tensor, row: SamplerInput) -> Tensor:
    """Return (1, V) logits after penalties, biases and grammar; -inf where a token may not come
    next."""
    if row.options.logits_processor is not None:
        logits = row.options.logits_processor.apply(logits)
    if row.mask is not None:
        allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
        allowed[: len(row.mask)] = row.mask[: logits.shape[1]]
        logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
    if not row.can_stop:
        logits = logits.clone()
        logits[:, row.options.stop_ids] = -torch.inf
    return logits


def token_logprob(scaled: Tensor, token: int, count: int) -> TokenLogprob:
    """Return a token's log-probability under the softmax of (1, V) logits, with the ``count`` most
    likely tokens."""
    total = torch.logsumexp(scaled, -1).item()
    top: list[tuple[int, float]] = []
    if count:
        values, ids = scaled[0].topk(min(count, scaled.shape[1]))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        top = [(i, v - total) for i, v in pairs if v > -torch.inf]
    logit = scaled[0, token].item() if token < scaled.shape[1] else -torch.inf
    return TokenLogprob(token, logit - total, top)
