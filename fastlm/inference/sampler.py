"""Choose the next tokens of a step, each with the options of its own sequence.

Logits on the CPU are read by one call into C++ for all rows (csrc/cpu/decode). Elsewhere, and
where that is not built, torch does the same (`fastlm.inference.sampling`, which is the definition).
Both draw the token at which the sum of probabilities exceeds the same random number.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm import backend
from fastlm.inference.requests import TokenLogprob
from fastlm.inference.sampling import Adjustments, Sampling


class TokenOptions:
    """How the tokens of one sequence are chosen: ``sampling``, the ``adjustments`` of its logits
    (`Adjustments` of one row), the tokens that end it, and ``vocab``: ids from it on are not drawn.
    """

    def __init__(
        self,
        sampling: Sampling,
        adjustments: Adjustments | None,
        ends: frozenset[int],
        vocab: int,
    ):
        self.sampling, self.adjustments, self.vocab = sampling, adjustments, vocab
        self.ends = sorted(token for token in ends if token < vocab)
        self._cpp: Any = None

    @property
    def cpp(self) -> Any:
        """The same in C++, which points into the tensors of ``adjustments``."""
        if self._cpp is None:
            s, a = self.sampling, self.adjustments
            seen, counts, bias = (None,) * 3 if a is None else (a.seen, a.counts, a.bias)
            self._cpp = backend.cpu_extension.TokenSampler(
                vocab=self.vocab,
                temperature=s.temperature,
                top_k=s.top_k or 0,
                top_p=-1.0 if s.top_p is None else s.top_p,
                min_p=-1.0 if s.min_p is None else s.min_p,
                repetition_penalty=s.repetition_penalty,
                presence_penalty=s.presence_penalty,
                frequency_penalty=s.frequency_penalty,
                ends=self.ends,
                seen=seen,
                counts=counts,
                bias=bias,
            )
        return self._cpp


class NextToken(NamedTuple):
    """Choose from row ``row`` of logits. ``mask`` (any size) bool: which tokens a grammar allows.
    ``may_end``: an end token may be chosen. ``logprobs``: report so many of the likeliest tokens;
    None: no log-probabilities."""

    row: int
    options: TokenOptions
    generator: torch.Generator
    mask: Tensor | None = None
    may_end: bool = True
    logprobs: int | None = None


class Choice(NamedTuple):
    """``token`` is -1 where the logits are not finite: one is NaN, or none may be chosen."""

    token: int
    logprob: TokenLogprob | None


class Sampler:
    """Chooses tokens from the logits of steps; for one thread at a time."""

    def __init__(self) -> None:
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._draw = torch.empty(1, dtype=torch.float64, device="cpu")

    def choose(self, logits: Tensor, rows: Sequence[NextToken]) -> list[Choice]:
        """Choose a token for each of ``rows`` from (L, V) logits.

        A row has the same result in any company where logits are on the CPU."""
        logits = logits.float()
        if (
            not logits.is_cpu
            or backend.forced_backend() not in (None, "cpu")
            or backend.unavailable_reason("cpu")
        ):
            return choose_with_torch(logits, rows)
        torch.get_num_threads()  # passes torch's number of threads to OpenMP
        needed = backend.cpu_extension.sample_workspace(logits.shape[1])
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        inputs = [
            (
                row,
                options.cpp,
                # what torch.rand of one float64 draws
                self._draw.uniform_(generator=generator).item()
                if options.sampling.temperature
                else 0.0,
                mask,
                may_end,
                -1 if logprobs is None else logprobs,
            )
            for row, options, generator, mask, may_end, logprobs in rows
        ]
        sampled = backend.cpu_extension.sample(logits, inputs, self._workspace)
        return [
            Choice(token, None if row.logprobs is None else TokenLogprob(token, logprob, top))
            for row, (token, logprob, top) in zip(rows, sampled, strict=True)
        ]


def choose_with_torch(logits: Tensor, rows: Sequence[NextToken]) -> list[Choice]:
    """`Sampler.choose` with torch operators, on any device: rows that are alike together, where
    their bits do not depend on that."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        plain = row.options.adjustments is None and row.mask is None and row.may_end
        sampling = row.options.sampling
        alike = plain and sampling.rowwise
        groups.setdefault((sampling, row.options.vocab) if alike else i, []).append(i)
    choices: list[Choice | None] = [None] * len(rows)
    for places in groups.values():
        part = [rows[i] for i in places]
        options = part[0].options
        own = logits[[row.row for row in part], : options.vocab]
        if len(part) == 1:
            own = allowed_logits(own, part[0])
        tokens = options.sampling.choose(own, [row.generator for row in part])
        finite = own.amax(-1).isfinite().tolist()  # not where all are -inf, or one is NaN
        for i, row, row_logits, token, good in zip(
            places, part, own, tokens.tolist(), finite, strict=True
        ):
            logprob = None
            if good and row.logprobs is not None:
                scaled = row_logits[None] / (options.sampling.temperature or 1.0)
                logprob = token_logprob(scaled, token, row.logprobs)
            choices[i] = Choice(token if good else -1, logprob)
    return [choice for choice in choices if choice is not None]


def allowed_logits(logits: Tensor, row: NextToken) -> Tensor:
    """(1, V) logits after penalties, biases and grammar; -inf where a token may not come next."""
    if row.options.adjustments is not None:
        logits = row.options.adjustments.apply(logits)
    if row.mask is not None:
        known = torch.zeros(logits.shape[1], dtype=torch.bool)
        known[: len(row.mask)] = row.mask[: logits.shape[1]]
        logits = logits.masked_fill(~known.to(logits.device), -torch.inf)
    if not row.may_end:
        logits = logits.clone()
        logits[:, row.options.ends] = -torch.inf
    return logits


def token_logprob(scaled: Tensor, token: int, count: int) -> TokenLogprob:
    """A token under the softmax of (1, V) logits, and the ``count`` likeliest."""
    total = torch.logsumexp(scaled, -1).item()
    top: list[tuple[int, float]] = []
    if count:
        values, ids = scaled[0].topk(min(count, scaled.shape[1]))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        top = [(i, v - total) for i, v in pairs if v > -torch.inf]
    own = scaled[0, token].item() if token < scaled.shape[1] else -torch.inf
    return TokenLogprob(token, own - total, top)
