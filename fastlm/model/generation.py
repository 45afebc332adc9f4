"""Generation with a key/value cache: tokens for a batch, or text piece by piece.

Rows of different lengths are padded on the left, and a mask hides the padding: positions count from
each row's first token, so a row's result is the same as alone. Rejected: right padding, which
scatters each step's keys to different columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.inference.answer_text import AnswerText, checked_stops
from fastlm.inference.sampling import Adjustments, Sampling, make_generators
from fastlm.model import cpu_steps, cuda_steps
from fastlm.model.layers import KVCache

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

_DEFAULT = Sampling()


class _Decoding:
    """The state of one generation: left-padded tokens (B, T), their mask, the cache."""

    def __init__(
        self,
        model: "CausalLM",
        ids: Tensor,
        mask: Tensor | None,
        steps: int,
        sampling: Sampling,
        vocab: int | None,
    ):
        self.model, self.sampling, self.mask = model, sampling, mask
        self.vocab = min(vocab or model.config.vocab_size, model.config.vocab_size)
        limit = model.context_limit
        if ids.shape[1] + 1 > limit:
            raise InputError(
                f"input_ids: wanted a prompt shorter than max_position_embeddings {limit},"
                f" got {ids.shape[1]} tokens"
            )
        self.steps = min(steps, limit - ids.shape[1])
        rows, width = ids.shape
        self.ids = ids.new_zeros(rows, width + self.steps, dtype=torch.int64)
        self.ids[:, :width] = ids
        self.length = width
        model.model.fuse()
        plan = cpu_steps.plan_of(model) if rows <= cpu_steps.MAX_ROWS else None
        self.cache = KVCache(
            model.config,
            rows,
            width + self.steps,
            dtype=model.dtype if plan is None else plan.cache_dtype,
            device=model.device,
        )
        starts = None if mask is None else mask.shape[1] - mask.sum(1)
        self.steps_of: cpu_steps.Steps | cuda_steps.Steps | None = None
        if plan is not None:
            self.steps_of = cpu_steps.Steps(model, plan, self.cache, starts)
        elif cuda_steps.why_not(model) is None:
            self.steps_of = cuda_steps.Steps(model, self.cache, starts)
        self.regime = None
        self.adjustments = None
        if sampling.adjusts:
            self.adjustments = Adjustments(sampling, ids, mask, self.vocab)

    @property
    def can_shrink(self) -> bool:
        return not isinstance(self.steps_of, cuda_steps.Steps)  # a graph has fixed addresses

    def shrink(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        at = torch.tensor(rows, device=self.ids.device)
        self.ids, self.cache.data = self.ids[at], self.cache.data[:, :, at]
        self.cache.layers = [layer.unbind() for layer in self.cache.data]
        self.mask = None if self.mask is None else self.mask[at]
        if self.adjustments is not None:
            self.adjustments.keep(at)
        if isinstance(self.steps_of, cpu_steps.Steps):
            self.steps_of.shrink(at)

    @torch.inference_mode()
    def step(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Run the tokens that the cache lacks and append one token per row, (B,). `logits` are then
        those that the tokens were drawn from.
        """
        regime = self.model.model.regime(self.length)
        if regime != self.regime:  # other rotary frequencies: the cached keys no longer match
            self.cache.length, self.regime = 0, regime
            if isinstance(self.steps_of, cpu_steps.Steps):
                self.steps_of.begin()
        new = self.ids[:, self.cache.length : self.length]
        mask = self.mask
        if mask is not None and mask.shape[1] < self.length:
            mask = self.mask = torch.cat((mask, mask.new_ones(mask.shape[0], 1)), 1)
        if not self.cache.length:
            logits = self.first_logits(new, mask)
        elif self.steps_of is not None and new.shape[1] == 1:
            logits = self.steps_of.logits(new[:, 0].contiguous())
        else:
            logits = self.model.next_logits(new, self.cache, mask)
        logits = logits[:, : self.vocab]
        if self.adjustments is not None:
            logits = self.adjustments.apply(logits)
        self.logits = logits
        token = self.sampling.choose(logits, generators)
        if self.adjustments is not None:
            self.adjustments.add(token)
        self.ids[:, self.length] = token
        self.length += 1
        return token

    def first_logits(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Fill an empty cache with prompts (B, S). Return the logits after them, (B, V). A prompt
        that several rows have is computed once.
        """
        told = ids if mask is None else ids.masked_fill(mask == 0, -1)
        prompts, prompt_of = torch.unique(told, dim=0, return_inverse=True)
        found = prompt_of.tolist()
        first = torch.tensor([found.index(i) for i in range(len(prompts))], device=ids.device)
        steps = self.steps_of
        short = ids.shape[1] <= cpu_steps.LONG_PROMPT
        if isinstance(steps, cpu_steps.Steps) and short and cpu_steps.takes_prompts(steps.plan):
            return steps.prompt_logits(ids, first, prompt_of)
        if len(prompts) == len(ids):
            return self.model.next_logits(ids, self.cache, mask)
        width, data = ids.shape[1], self.cache.data
        part = KVCache(self.model.config, len(first), width, dtype=data.dtype, device=data.device)
        logits = self.model.next_logits(ids[first], part, None if mask is None else mask[first])
        for layer, own in zip(data, part.data, strict=True):
            layer[..., :width, :] = own[:, prompt_of]
        self.cache.length = part.length
        return logits[prompt_of]


def generate(
    model: "CausalLM",
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = _DEFAULT,
    seed: int | None = None,
    stop_ids: Sequence[int] | frozenset[int] = (),
    ignore_eos: bool = False,
    attention_mask: Tensor | None = None,
    on_token: Callable[[int, int], Any] | None = None,
    return_logprobs: bool = False,
    vocab_size: int | None = None,
) -> Any:
    """Continue every row by at most `max_new_tokens` tokens.

    A row ends with the first of the model's end tokens (``model.config.stop_ids``) that it draws.
    That token is kept.

    Args:
        input_ids: (B, S) integers, or a list of B lists of ids of any lengths >= 1.
        sampling: see `Sampling`; by default draws at temperature 1.
        seed: row r draws from seed + r, as it would alone with that seed; None uses torch's
            generator.
        stop_ids: additional tokens that end a row.
        ignore_eos: only `stop_ids` end a row, not the model's end tokens.
        attention_mask: (B, S), 0 where a row of the tensor is padding; padding is on the left.
        on_token: called with (row, token) for each new token, rows in order; a true result ends
            the row.
        return_logprobs: also return the new tokens' log-probabilities (`Sampling.logprobs`).
        vocab_size: draw ids below it alone: a padded model has more than its tokenizer. By default
            the model's.

    Generation also ends where the context reaches max_position_embeddings, in the same way as at
    max_new_tokens.

    Returns:
        For a tensor, (B, S + new) int64, padded after a row's end with pad_token_id (the row's last
        token where the config has none). For a list, a list of B lists: prompt and new tokens, no
        padding. With return_logprobs the pair of that and B lists of a float per new token.

    Raises InputError: empty prompts, ids out of range, a prompt as long as the context, impossible
    options.
    """
    ids, mask, lengths = _batch(model, input_ids, attention_mask)
    _check_steps(max_new_tokens)
    ends = _end_ids(model, stop_ids, ignore_eos)
    generators = make_generators(seed, ids.shape[0])
    new: list[list[int]] = [[] for _ in range(ids.shape[0])]
    logprobs: list[list[float]] = [[] for _ in range(ids.shape[0])]
    if max_new_tokens and ids.shape[0]:
        rows = list(range(ids.shape[0]))  # those that are decoded
        live = set(rows)
        state = _Decoding(model, ids, mask, max_new_tokens, sampling, vocab_size)
        for _ in range(state.steps):
            chosen = state.step([generators[row] for row in rows])
            if return_logprobs:
                for row, logp in zip(rows, sampling.logprobs(state.logits, chosen).tolist()):
                    if row in live:
                        logprobs[row].append(logp)
            for row, token in zip(rows, chosen.tolist()):
                if row not in live:
                    continue
                new[row].append(token)
                stopped = on_token is not None and on_token(row, token)
                if stopped or token in ends:
                    live.discard(row)
            if not live:
                break
            if 2 * len(live) <= len(rows) and state.can_shrink:  # a copy of the cache
                places = [i for i, row in enumerate(rows) if row in live]
                state.shrink(places)
                rows = [rows[i] for i in places]
    if lengths is not None:
        prompts = [ids[r, ids.shape[1] - n :].tolist() for r, n in enumerate(lengths)]
        whole = [p + n for p, n in zip(prompts, new)]
        return (whole, logprobs) if return_logprobs else whole
    width = max(map(len, new), default=0)
    pad = model.config.pad_token_id
    # a slice: with max_new_tokens 0 no row has a last token
    rows = [n + (n[-1:] if pad is None else [pad]) * (width - len(n)) for n in new]
    tail = torch.tensor(rows, dtype=torch.int64, device=ids.device).view(len(rows), width)
    whole = torch.cat((ids.long(), tail), 1)
    return (whole, logprobs) if return_logprobs else whole


def _end_ids(
    model: "CausalLM", stop_ids: Sequence[int] | frozenset[int], ignore_eos: bool
) -> frozenset[int]:
    return frozenset(stop_ids) | (frozenset() if ignore_eos else model.config.stop_ids)


def _batch(
    model: "CausalLM", input_ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None
) -> tuple[Tensor, Tensor | None, list[int] | None]:
    """Left-padded ids (B, S), their mask (None where nothing is padded), and the lengths of
    a list's rows.
    """
    lengths = None
    if isinstance(input_ids, Tensor):
        ids = input_ids.to(model.device)
    else:
        if mask is not None:
            raise InputError(
                "attention_mask: wanted with a tensor of input_ids, got it with a list"
            )
        if isinstance(input_ids, str):
            raise InputError(
                "input_ids: wanted a tensor (B, S) or a list of B lists of token ids, got a str"
                " (fastlm.Tokenizer encodes text, fastlm.generate_text continues it)"
            )
        if isinstance(input_ids, Mapping) or any(isinstance(row, int | str) for row in input_ids):
            raise InputError(
                "input_ids: wanted a tensor (B, S) or a list of B lists,"
                f" got a flat {type(input_ids).__name__}"
            )
        lengths = [len(row) for row in input_ids]
        width = max(lengths, default=0)
        ids = torch.zeros(len(lengths), width, dtype=torch.int64, device="cpu")
        for r, row in enumerate(input_ids):
            ids[r, width - len(row) :] = torch.as_tensor(row, dtype=torch.int64, device="cpu")
        ids = ids.to(model.device)
        if min(lengths, default=0) < width:
            columns = torch.arange(width, device=ids.device)
            starts = torch.tensor([width - n for n in lengths], device=ids.device)
            mask = (columns >= starts[:, None]).long()
    model.check_ids(ids)
    if mask is not None:
        if mask.shape != ids.shape:
            raise InputError(
                f"attention_mask: wanted {tuple(ids.shape)} as input_ids, got {tuple(mask.shape)}"
            )
        mask = mask.to(model.device).long()
        if not bool((mask.diff(dim=1) >= 0).all()):
            raise InputError("attention_mask: wanted padding on the left only, got it elsewhere")
        if bool(mask.all()):
            mask = None
    counts = [ids.shape[1]] * ids.shape[0] if mask is None else mask.sum(1).tolist()
    if ids.shape[0] and min(counts) == 0:
        raise InputError("input_ids: wanted at least one token in each row, got an empty prompt")
    return ids, mask, lengths


def generate_text(
    model: "CausalLM",
    tokenizer: "Tokenizer",
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = _DEFAULT,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | frozenset[int] = (),
    ignore_eos: bool = False,
) -> Iterator[str]:
    """Continue one prompt, yielding text piece by piece as soon as it is certain.

    `stop` strings end the text before they appear in it, even where they straddle tokens: text that
    may become one is held back. The end tokens of model and tokenizer (unless `ignore_eos`) and
    `stop_ids` end it, too, and are not part of the text.
    """
    _check_steps(max_new_tokens)
    text = AnswerText(tokenizer, checked_stops(stop))
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    batch, mask, _ = _batch(model, [ids], None)
    own = frozenset() if ignore_eos else tokenizer.stop_ids
    ends = _end_ids(model, stop_ids, ignore_eos) | own
    vocab = tokenizer.vocab_size
    return _pieces(model, text, batch, mask, max_new_tokens, sampling, seed, ends, vocab)


def _check_steps(count: Any) -> None:
    if not isinstance(count, int) or count < 0:
        raise InputError(f"max_new_tokens: wanted an integer >= 0, got {count!r}")


def _pieces(
    model: "CausalLM",
    text: "AnswerText",
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    ends: frozenset[int],
    vocab: int,
) -> Iterator[str]:
    generators = make_generators(seed, 1)
    state = _Decoding(model, ids, mask, max_new_tokens, sampling, vocab)
    for _ in range(state.steps):
        token = int(state.step(generators))
        if token in ends:
            break
        if piece := text.push(token):
            yield piece
        if text.stopped:
            return
    if rest := text.flush():
        yield rest


@dataclass(frozen=True)
class Generated:
    """The result for a row: `tokens` with the end token, `text` without it.

    `finish_reason`: "stop" at an end token, at a stop string or through `on_token`, "length" at
    max_new_tokens, "context" where the longest row of the batch reaches max_position_embeddings.
    """

    text: str
    tokens: list[int]
    finish_reason: str


def generate_texts(
    model: "CausalLM",
    tokenizer: "Tokenizer",
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = _DEFAULT,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | frozenset[int] = (),
    ignore_eos: bool = False,
    on_text: Callable[[int, str], Any] | None = None,
    on_token: Callable[[int, int], Any] | None = None,
) -> list[Generated]:
    """`generate_text` of several prompts as one batch.

    `on_text` is called with (row, piece of text). `on_token` is called before it, as in `generate`.
    """
    stops = checked_stops(stop)
    texts = [AnswerText(tokenizer, stops) for _ in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]
    own = frozenset() if ignore_eos else tokenizer.stop_ids
    ends = _end_ids(model, stop_ids, ignore_eos) | own

    def add(row: int, piece: str) -> None:
        if piece:
            pieces[row].append(piece)
            if on_text is not None:
                on_text(row, piece)

    def take(row: int, token: int) -> bool:
        stopped = on_token is not None and bool(on_token(row, token))
        if token not in ends:
            add(row, texts[row].push(token))
        return stopped or texts[row].stopped

    ids = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    rows = generate(
        model, ids, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop_ids=ends,
        ignore_eos=ignore_eos, on_token=take, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    results = []
    for row, (prompt, tokens) in enumerate(zip(ids, rows)):
        new = tokens[len(prompt) :]
        if not texts[row].stopped:
            add(row, texts[row].flush())
        reason = "stop"
        if not texts[row].stopped and not (new and new[-1] in ends):
            if len(new) == max_new_tokens:
                reason = "length"
            elif max(map(len, ids)) + len(new) == model.context_limit:
                reason = "context"
        results.append(Generated("".join(pieces[row]), new, reason))
    return results
