"""Sampling of the next token from logits: penalties, filters, and draws that a seed reproduces.

The order is that of transformers: penalties and biases, temperature, top-k, top-p, min-p. Filters
work on candidates sorted by logit, so a draw compares one uniform number with a cumulative sum.
Rejected: masking the vocabulary with -inf and ``torch.multinomial`` over it. At V = 49152 a full
sort takes longer than a layer, and the draw depends on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.errors import InputError

# The number of candidates that top-p and min-p examine before they sort the whole vocabulary: text
# models put a probability of 0.95 on fewer
_NUM_CANDIDATES = 256
_MAX = 1e9  # of a penalty or a bias: sums of them stay finite in float32
_MAX_ROW_INVARIANT_K = 1024  # top_k up to which a row's bits do not depend on the number of rows
_BLOCK = 256  # tokens of the vocabulary whose probabilities are summed together, without filters


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled. None switches a filter off.

    temperature: divides the logits; 0 is greedy decoding, which ignores the filters.
    top_k: keep the k most likely tokens.
    top_p: keep the smallest set of most likely tokens whose probabilities reach this sum; at least
        one token.
    min_p: keep tokens at least min_p times as likely as the most likely one.
    repetition_penalty: divides the logits of tokens already in the row where they are positive, and
        multiplies them where they are negative.
    presence_penalty: is subtracted from the logits of tokens that the answer has.
    frequency_penalty: likewise, once for each occurrence.
    logit_bias: pairs of a token and a number that is added to its logit.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        t, k, p, m = _number(self.temperature), self.top_k, self.top_p, self.min_p
        bounds = f"from -{_MAX:g} to {_MAX:g}"
        biases = self.logit_bias
        checks = {
            "temperature": ("0 or at least 1e-6", t == 0 or 1e-6 <= t < math.inf),
            "top_k": (">= 1 or None", k is None or _integer(k) >= 1),
            "top_p": ("in (0, 1] or None", p is None or 0 < _number(p) <= 1),
            "min_p": ("in [0, 1] or None", m is None or 0 <= _number(m) <= 1),
            "repetition_penalty": ("> 0", 0 < _number(self.repetition_penalty) < math.inf),
            "presence_penalty": (bounds, abs(_number(self.presence_penalty)) <= _MAX),
            "frequency_penalty": (bounds, abs(_number(self.frequency_penalty)) <= _MAX),
            "logit_bias": (
                f"pairs of a token id >= 0 and a number {bounds}",
                isinstance(biases, tuple) and all(map(_is_bias, biases)),
            ),
        }
        for name, (expected, is_valid) in checks.items():
            if not is_valid:
                raise InputError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def has_adjustments(self) -> bool:
        """Whether a `LogitsProcessor` changes any logits."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)

    @property
    def has_filters(self) -> bool:
        """Whether some tokens may not be drawn."""
        filters = (self.top_k, self.top_p, self.min_p)
        return self.temperature != 0 and filters != (None, None, None)

    @property
    def is_row_invariant(self) -> bool:
        """Whether `sample` gives a row the same bits, however many rows there are. Torch splits the
        sum over a vocabulary differently for one row than for many, but not the sum over top_k
        values.
        """
        if not self.has_filters:
            return True
        return self.top_k is not None and self.top_k <= _MAX_ROW_INVARIANT_K

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens that may be drawn: probabilities (B, C) float64, in descending order, 0
        after a row's last candidate, and ids (B, C).

        `logits` (B, V) float32, after penalties; temperature > 0.
        """
        scaled = logits / self.temperature
        vocab = scaled.shape[1]
        if self.top_k is not None:
            values, ids = scaled.topk(min(self.top_k, vocab))
            return self._filter(values, torch.logsumexp(values.double(), -1, keepdim=True)), ids
        total = torch.logsumexp(scaled.double(), -1, keepdim=True)
        if self.top_p is None and self.min_p is None:
            ids = torch.arange(vocab, device=logits.device)
            return (scaled.double() - total).exp(), ids.expand_as(scaled)
        if vocab > 2 * _NUM_CANDIDATES:
            values, ids = scaled.topk(_NUM_CANDIDATES)
            probabilities = self._filter(values, total)
            if bool((probabilities[:, -1] == 0).all()):  # each row's last candidate is among these
                return probabilities, ids
        values, ids = scaled.sort(descending=True, stable=True)
        return self._filter(values, total), ids

    def _filter(self, values: Tensor, total: Tensor) -> Tensor:
        """Return the probabilities of sorted logits (B, C); those of filtered tokens are 0.
        `total`: each row's logsumexp."""
        p = (values.double() - total).exp()
        if self.top_p is not None and self.top_p < 1:
            preceding = p.cumsum(-1) - p
            p = p.masked_fill(preceding >= self.top_p, 0.0)  # the sum before the first is 0
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p[:, :1], 0.0)
        return p

    def sample(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw one token per row, (B,) int64, from (B, V) logits and one CPU generator per row."""
        logits = logits.float()
        if self.temperature == 0:
            return logits.argmax(-1)
        draws = [torch.rand(1, dtype=torch.float64, device="cpu", generator=g) for g in generators]
        u = torch.cat(draws)[:, None].to(logits.device)
        if not self.has_filters:
            scaled = logits if self.temperature == 1 else logits / self.temperature
            return _sample_unfiltered(scaled, u)
        p, ids = self.candidates(logits)
        sums = p.cumsum(-1)
        # u < 1, so the first sum above u * total has p > 0
        index = torch.searchsorted(sums, u * sums[:, -1:], right=True)
        return ids.gather(-1, index.clamp(max=p.shape[1] - 1))[:, 0]

    def logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Return log softmax(logits / temperature) at `tokens` (B,), (B,) float32. Filters do not
        count, and greedy decoding has temperature 1.
        """
        scaled = logits.float() / (self.temperature or 1.0)
        return scaled.gather(-1, tokens[:, None])[:, 0] - torch.logsumexp(scaled, -1)


def _sample_unfiltered(scaled: Tensor, u: Tensor) -> Tensor:
    """Draw one token per row from softmax(scaled), (B, V), by uniform numbers u (B, 1): first a
    block of the vocabulary, then a token of it. A row that is not finite gives any token.

    Cumulative sums of the whole vocabulary in float64 took a third of a step of 32 rows of SmolLM2.
    """
    p = scaled.softmax(-1)
    if padding := -p.shape[1] % _BLOCK:
        p = F.pad(p, (0, padding))
    blocks = p.view(len(p), -1, _BLOCK)
    block_sums = blocks.sum(-1).double()
    sums = block_sums.cumsum(-1)
    target = u * sums[:, -1:]
    # u < 1, so the first sum above u * total is that of a block, and of a token, with p > 0
    block = torch.searchsorted(sums, target, right=True).clamp(max=block_sums.shape[1] - 1)
    rest = target - (sums.gather(-1, block) - block_sums.gather(-1, block))
    inner = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(-1)
    rest = torch.minimum(rest.clamp(min=0), inner[:, -1:] * (1 - 1e-12))  # as rounded
    index = torch.searchsorted(inner, rest.contiguous(), right=True).clamp(max=_BLOCK - 1)
    return (block * _BLOCK + index)[:, 0].clamp(max=scaled.shape[1] - 1)


class LogitsProcessor:
    """Applies the penalties and biases of rows that share a `Sampling`, and keeps the tokens that
    they depend on.

    ``ids`` (B, T): the prompts; ``mask`` (B, T) is 0 where they are padding. ``vocab``: ids from it
    on are not drawn. InputError: `logit_bias` has a token that the vocabulary lacks.
    """

    def __init__(self, sampling: Sampling, ids: Tensor, mask: Tensor | None, vocab: int):
        self.sampling = sampling
        rows, device = len(ids), ids.device
        self.bias = None
        if sampling.logit_bias:
            tokens = [token for token, _ in sampling.logit_bias]
            if max(tokens) >= vocab:
                raise InputError(f"logit_bias: expected ids in [0, {vocab}), got {max(tokens)}")
            self.bias = torch.zeros(vocab, device=device)
            for token, bias in sampling.logit_bias:
                self.bias[token] += bias
        self.repetition_mask = self.counts = None
        if sampling.repetition_penalty != 1.0:
            self.repetition_mask = torch.zeros(rows, vocab, dtype=torch.bool, device=device)
            present = ids < vocab if mask is None else mask.bool() & (ids < vocab)
            row = torch.arange(rows, device=device)[:, None].expand_as(ids)
            self.repetition_mask[row[present], ids.long()[present]] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(rows, vocab, device=device)

    def apply(self, logits: Tensor) -> Tensor:
        """Return new logits (B, V) float32 of logits (B, V)."""
        logits = logits.float()
        if self.repetition_mask is not None:
            logits = apply_repetition_penalty(
                logits, self.repetition_mask, self.sampling.repetition_penalty
            )
        if self.counts is not None:
            per_token = self.counts * self.sampling.frequency_penalty
            logits = logits - per_token - (self.counts > 0) * self.sampling.presence_penalty
        return logits if self.bias is None else logits + self.bias

    def add(self, tokens: Tensor) -> None:
        """Count the new token of each row, (B,)."""
        if self.repetition_mask is not None:
            self.repetition_mask.scatter_(1, tokens[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(self.counts[:, :1]))


def apply_repetition_penalty(logits: Tensor, mask: Tensor, penalty: float) -> Tensor:
    """Return (B, V) logits in which the tokens of `mask` (B, V) bool are less likely (CTRL,
    arXiv:1909.05858).
    """
    weakened = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(mask, weakened, logits)


def check_seed(seed: int | None) -> None:
    """Raise InputError unless ``seed`` is None or an integer that a generator accepts."""
    # compared as integers: 2^63 - 1 is 2^63 as a float
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise InputError(f"seed: expected an integer in [0, 2^63) or None, got {seed!r}")


def make_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """Return a CPU generator per row. Row r of seed s draws what a single row of seed s + r
    draws."""
    check_seed(seed)
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    return [torch.Generator("cpu").manual_seed((seed + r) % 2**63) for r in range(rows)]


def _number(value: object) -> float:
    """Return the value as float, or NaN, which fails every comparison, if it is not a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]


def _is_bias(pair: object) -> bool:
    match pair:
        case (token, bias) if isinstance(pair, tuple):
            return _integer(token) >= 0 and abs(_number(bias)) <= _MAX
    return False


def _integer(value: object) -> float:
    """Return the value as float, or NaN if it is not an integer."""
    return _number(value) if isinstance(value, int) else math.nan
