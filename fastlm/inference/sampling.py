"""From logits to the next token: penalties, filters, and draws that a seed reproduces.

The order is transformers': penalties and biases, temperature, top-k, top-p, min-p. Filters work on
candidates sorted by logit, so that a draw is one uniform number against a cumulative sum.
Rejected: masking the vocabulary with -inf and ``torch.multinomial`` over it; at V = 49152 a full
sort takes longer than a layer, and the draw depends on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.errors import InputError

# Candidates that top-p and min-p examine before they sort the whole vocabulary: text models put a
# probability of 0.95 on fewer
_FIRST_LOOK = 256
_MAX = 1e9  # of a penalty or a bias: sums of them stay finite in float32
_ROWWISE = 1024  # top_k up to which a row's bits do not depend on the number of rows
_BLOCK = 256  # tokens of the vocabulary whose probabilities are summed together, without filters


@dataclass(frozen=True)
class Sampling:
    """How to choose a token; None switches a filter off.

    temperature: divides the logits; 0 is greedy, whatever the filters say.
    top_k: only the k likeliest.
    top_p: the fewest likeliest that together reach this probability, at least one.
    min_p: only those at least min_p as likely as the likeliest.
    repetition_penalty: logits of tokens already in the row are divided by it where positive,
    multiplied where negative.
    presence_penalty: taken off the logits of tokens that the answer already has.
    frequency_penalty: likewise, once for each time that it has them.
    logit_bias: pairs of a token and what is added to its logit.
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
            "top_k": (">= 1 or None", k is None or _whole(k) >= 1),
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
        for name, (wanted, good) in checks.items():
            if not good:
                raise InputError(f"{name}: expected {wanted}, got {getattr(self, name)!r}")

    @property
    def adjusts(self) -> bool:
        """Whether `Adjustments` change any logits."""
        plain = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return plain != (1.0, 0.0, 0.0) or bool(self.logit_bias)

    @property
    def filters(self) -> bool:
        """Whether some tokens may not be drawn."""
        given = (self.top_k, self.top_p, self.min_p)
        return self.temperature != 0 and given != (None, None, None)

    @property
    def rowwise(self) -> bool:
        """Whether `choose` has the same bits for a row alone as for many at once. Torch splits the
        sum over a vocabulary otherwise for one row than for many; that of top_k values it does not.
        """
        return not self.filters or (self.top_k is not None and self.top_k <= _ROWWISE)

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that may be drawn: probabilities (B, C) float64, descending, 0 after a row's
        last, and ids (B, C).

        `logits` (B, V) float32, already penalised; temperature > 0.
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
        if vocab > 2 * _FIRST_LOOK:
            values, ids = scaled.topk(_FIRST_LOOK)
            probabilities = self._filter(values, total)
            if bool((probabilities[:, -1] == 0).all()):  # each row's last candidate is among these
                return probabilities, ids
        values, ids = scaled.sort(descending=True, stable=True)
        return self._filter(values, total), ids

    def _filter(self, values: Tensor, total: Tensor) -> Tensor:
        """Probabilities of sorted logits (B, C), filtered ones 0. `total`: each row's logsumexp."""
        p = (values.double() - total).exp()
        if self.top_p is not None and self.top_p < 1:
            before = p.cumsum(-1) - p
            p = p.masked_fill(before >= self.top_p, 0.0)  # the sum before the first is 0
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p[:, :1], 0.0)
        return p

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One token per row, (B,) int64, from (B, V) logits and one CPU generator per row."""
        logits = logits.float()
        if self.temperature == 0:
            return logits.argmax(-1)
        draws = [torch.rand(1, dtype=torch.float64, device="cpu", generator=g) for g in generators]
        u = torch.cat(draws)[:, None].to(logits.device)
        if not self.filters:
            scaled = logits if self.temperature == 1 else logits / self.temperature
            return _drawn(scaled, u)
        p, ids = self.candidates(logits)
        reached = p.cumsum(-1)
        # u < 1, so the first sum above u * total has p > 0
        place = torch.searchsorted(reached, u * reached[:, -1:], right=True)
        return ids.gather(-1, place.clamp(max=p.shape[1] - 1))[:, 0]

    def logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """log softmax(logits / temperature) at `tokens` (B,), (B,) float32: filters do not count,
        and greedy choice has temperature 1.
        """
        scaled = logits.float() / (self.temperature or 1.0)
        return scaled.gather(-1, tokens[:, None])[:, 0] - torch.logsumexp(scaled, -1)


def _drawn(scaled: Tensor, u: Tensor) -> Tensor:
    """One token per row from softmax(scaled), (B, V), by uniform numbers u (B, 1): first a block of
    the vocabulary, then a token of it; any token where a row is not finite.

    Cumulative sums of the whole vocabulary in float64 took a third of a step of 32 rows of SmolLM2.
    """
    p = scaled.softmax(-1)
    if beyond := -p.shape[1] % _BLOCK:
        p = F.pad(p, (0, beyond))
    blocks = p.view(len(p), -1, _BLOCK)
    sums = blocks.sum(-1).double()
    reached = sums.cumsum(-1)
    wanted = u * reached[:, -1:]
    # u < 1, so the first sum above u * total is that of a block, and of a token, with p > 0
    block = torch.searchsorted(reached, wanted, right=True).clamp(max=sums.shape[1] - 1)
    rest = wanted - (reached.gather(-1, block) - sums.gather(-1, block))
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(-1)
    rest = torch.minimum(rest.clamp(min=0), inside[:, -1:] * (1 - 1e-12))  # as rounded
    place = torch.searchsorted(inside, rest.contiguous(), right=True).clamp(max=_BLOCK - 1)
    return (block * _BLOCK + place)[:, 0].clamp(max=scaled.shape[1] - 1)


class Adjustments:
    """Penalties and biases of rows that share a `Sampling`, and the tokens that they depend on.

    ``ids`` (B, T): the prompts; ``mask`` (B, T) is 0 where they are padding. ``vocab``: ids from it
    on are not drawn. InputError: a biased token that the vocabulary lacks.
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
        self.seen = self.counts = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device)
            present = ids < vocab if mask is None else mask.bool() & (ids < vocab)
            row = torch.arange(rows, device=device)[:, None].expand_as(ids)
            self.seen[row[present], ids.long()[present]] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(rows, vocab, device=device)

    def apply(self, logits: Tensor) -> Tensor:
        """(B, V) -> new logits (B, V) float32."""
        logits = logits.float()
        if self.seen is not None:
            logits = penalise(logits, self.seen, self.sampling.repetition_penalty)
        if self.counts is not None:
            per_token = self.counts * self.sampling.frequency_penalty
            logits = logits - per_token - (self.counts > 0) * self.sampling.presence_penalty
        return logits if self.bias is None else logits + self.bias

    def add(self, tokens: Tensor) -> None:
        """Count the new token of each row, (B,)."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(self.counts[:, :1]))


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens in `seen` (B, V) bool less likely in (B, V) logits (CTRL, arXiv:1909.05858).

    Returns new logits.
    """
    weakened = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, weakened, logits)


def check_seed(seed: int | None) -> None:
    """InputError: no integer that a generator takes."""
    # compared as integers: 2^63 - 1 is 2^63 as a float
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise InputError(f"seed: expected an integer in [0, 2^63) or None, got {seed!r}")


def make_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """A CPU generator per row. Row r of seed s draws what a single row of seed s + r draws."""
    check_seed(seed)
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    return [torch.Generator("cpu").manual_seed((seed + r) % 2**63) for r in range(rows)]


def _number(value: object) -> float:
    """The value as float, or NaN, which fails every comparison, if it is not a number."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if good else math.nan  # type: ignore[arg-type]


def _is_bias(pair: object) -> bool:
    match pair:
        case (token, bias) if isinstance(pair, tuple):
            return _whole(token) >= 0 and abs(_number(bias)) <= _MAX
    return False


def _whole(value: object) -> float:
    return _number(value) if isinstance(value, int) else math.nan
