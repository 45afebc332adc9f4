"""Likelihoods and answers of a model, for evaluations.

Likelihoods come from forwards over packed sequences that compute a common prefix once
(`fastlm.evals.prefix_sharing`). Answers come from the engine; its KV cache shares the blocks of
prompts with a common prefix.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.evals.prefix_sharing import PrefixBatch, prefix_batches
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Completion, Request
from fastlm.inference.sampling import Sampling
from fastlm.ops import linear_logprobs
from fastlm.ops.linear import split_float32, uses_split_float32

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

Pair = tuple[str, str]
# per forward: matrix products reach full speed; 1.5 GB of activations at hidden size 4096
TOKENS = 4096
KEYS = 65536  # keys that each layer copies: 128 MB at 8 key heads of 128 in bfloat16
# Nats. Above it a token's logit exceeds all others by 0.4, more than bfloat16's rounding
_CERTAIN_LOGPROB = -0.5
_GREEDY_ROWS = 256  # rows of logits at once: 50 MB at a vocabulary of 49,152


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The likelihood of a continuation after its context.

    logprob: nats, summed over its ``tokens``.
    greedy: True if each token was the likeliest; None if this was not computed.
    truncated_tokens: how many tokens at the start of the context were dropped to fit.
    """

    logprob: float
    tokens: int
    greedy: bool | None = None
    truncated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """A text to continue; with ``chat`` a user's message for the chat template.

    history: the earlier turns of a chat, (message, answer) each.
    stop: strings that end the answer, or the names of special tokens.
    sampling: sampling options; default: the temperature of the call.
    """

    text: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    chat: bool = False
    seed: int = 0
    sampling: Sampling | None = None
    history: tuple[tuple[str, str], ...] = ()


class Scorer:
    """A model and its tokenizer, for evaluations.

    Args:
        tokens: maximum number of tokens per forward.
        limit: maximum context in tokens; default: the model's.
        add_bos: True if a text begins with BOS; default: what the tokenizer does.
        prefix: the token before a text without a context; default: BOS, else EOS.
        parse_special: convert special tokens that are spelt out in a text to their ids. A text that
            begins with the prefix then gets no BOS (as in lm-evaluation-harness).
        split_float32: on a CPU with AMX, compute the float32 products of layers and head for
            likelihoods as three of bfloat16 (`fastlm.ops.linear.split_float32`).

    A likelihood depends on the other pairs of the call, but only by rounding. For bitwise equal
    results pass the same pairs.
    """

    def __init__(
        self,
        model: "CausalLM",
        tokenizer: "Tokenizer",
        *,
        tokens: int = TOKENS,
        limit: int | None = None,
        add_bos: bool | None = None,
        prefix: int | None = None,
        parse_special: bool = False,
        split_float32: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.parse_special, self.split_float32 = parse_special, split_float32
        if limit is not None and not 1 <= limit <= model.context_limit:
            raise InputError(f"limit: expected 1 to {model.context_limit}, got {limit}")
        self.context_limit = limit or model.context_limit
        if prefix is not None and not 0 <= prefix < model.config.vocab_size:
            raise InputError(f"prefix: expected 0 to {model.config.vocab_size - 1}, got {prefix}")
        self._prefix = prefix
        bos = tokenizer.bos_id
        if add_bos is None:
            add_bos = bos is not None and tokenizer.encode("a", special=True)[:1] == [bos]
        elif add_bos and bos is None:
            raise InputError("add_bos: expected a tokenizer with BOS, got one without")
        self.start = [bos] if add_bos and bos is not None else []

    @cached_property
    def prefix(self) -> int:
        """The token before a text without a context: BOS, else EOS."""
        for token in (self._prefix, self.tokenizer.bos_id, self.tokenizer.eos_id):
            if token is not None:
                return token
        raise InputError("context: expected text, as this model has neither BOS nor EOS, got none")

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, with BOS if the tokenizer adds it."""
        ids = self.tokenizer.encode_batch(texts, parse_special=self.parse_special)
        if not self.start:
            return ids
        prefix_text = (
            self.tokenizer.decode([self.prefix], special=True) if self.parse_special else ""
        )
        return [
            text_ids if prefix_text and text.startswith(prefix_text) else [*self.start, *text_ids]
            for text, text_ids in zip(texts, ids, strict=True)
        ]

    # likelihoods

    def loglikelihoods(
        self,
        pairs: Sequence[Pair],
        *,
        chat: bool = False,
        greedy: bool = False,
        on_result: Callable[[int, Likelihood], Any] | None = None,
    ) -> list[Likelihood]:
        """Return the likelihood of each continuation after its context, in the order of ``pairs``.

        The joined text is tokenized. As many tokens as the context has by itself belong to the
        context; spaces at its end count as the continuation's, except in a chat (as in
        lm-evaluation-harness). A context that does not fit is truncated at its start.

        Args:
            chat: contexts are user messages, continuations are answers.
            greedy: also compute whether each token was the likeliest.
            on_result: is called with the index of a pair and its likelihood as soon as it is known.

        InputError: a continuation is empty, or longer than the context.
        """
        return self.token_loglikelihoods(
            self.encode(pairs, chat=chat), greedy=greedy, on_result=on_result
        )

    def encode(
        self, pairs: Sequence[Pair], *, chat: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of each context and its continuation; see `loglikelihoods`."""
        if chat:
            contexts = {text: self._chat(text) for text, _ in pairs}
            after = self.tokenizer.encode_batch([text for _, text in pairs])
            return [(contexts[c], ids) for (c, _), ids in zip(pairs, after, strict=True)]
        joined = [(context.rstrip(), context + continuation) for context, continuation in pairs]
        texts = list(dict.fromkeys([c for c, _ in joined] + [full_text for _, full_text in joined]))
        ids_of = dict(zip(texts, self.encode_texts(texts), strict=True))
        return [
            (ids_of[c], ids_of[full_text][len(ids_of[c]) :])
            if c
            else self._split_prefix(ids_of[full_text])
            for c, full_text in joined
        ]

    def _split_prefix(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Split the tokens of a text without a context into the prefix and the rest."""
        if self.start and ids[: len(self.start)] == self.start:
            ids = ids[len(self.start) :]
        return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])

    def _chat(self, text: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        turns = [part for turn in history for part in zip(("user", "assistant"), turn)]
        messages = [
            {"role": role, "content": content} for role, content in (*turns, ("user", text))
        ]
        return self.tokenizer.encode_chat(messages)

    def token_loglikelihoods(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        greedy: bool = False,
        on_result: Callable[[int, Likelihood], Any] | None = None,
    ) -> list[Likelihood]:
        """Return `loglikelihoods` for pairs of token ids, neither of them empty."""
        limit = self.context_limit
        sequences, continuations, cuts = [], [], []
        for i, (context, continuation) in enumerate(pairs):
            if not continuation:
                raise InputError(f"pairs[{i}]: expected a continuation with a token, got none")
            if len(continuation) > limit:
                raise InputError(
                    f"pairs[{i}]: expected a continuation of at most the context's {limit} tokens,"
                    f" got {len(continuation)}"
                )
            sequence = [*context, *continuation][:-1]  # the last token is only predicted
            cuts.append(max(0, len(sequence) - limit))
            sequences.append(sequence[cuts[-1] :])
            continuations.append(list(continuation))
        likelihoods: list[Likelihood | None] = [None] * len(pairs)
        # RoPE frequencies that depend on the length are those of the longest sequence of a batch
        max_sequences = 1 if self.model.model.depends_on_length else None
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), split_float32(self.split_float32):
                for batch in prefix_batches(
                    sequences, tokens=self.tokens, keys=KEYS, max_sequences=max_sequences
                ):
                    scored = self._score(batch, [continuations[i] for i in batch.members], greedy)
                    for i, (logprob, best) in zip(batch.members, scored, strict=True):
                        likelihood = Likelihood(logprob, len(continuations[i]), best, cuts[i])
                        likelihoods[i] = likelihood
                        if on_result is not None:
                            on_result(i, likelihood)
        finally:
            self.model.train(training)
        return [likelihood for likelihood in likelihoods if likelihood is not None]

    def rolling(
        self, texts: Sequence[str], *, on_result: Callable[[int, Likelihood], Any] | None = None
    ) -> list[Likelihood]:
        """Return the likelihood of each full text.

        A text longer than the context is split into windows. Each begins where the previous one
        ended; the last has as much context as fits (as in lm-evaluation-harness).

        Args:
            on_result: is called with the index of a window and its likelihood.
        """
        windows = [list(self._windows(ids)) for ids in self.encode_texts(texts)]
        likelihoods = iter(
            self.token_loglikelihoods(
                [w for text_windows in windows for w in text_windows], on_result=on_result
            )
        )
        sums = []
        for text_windows in windows:
            parts = [next(likelihoods) for _ in text_windows]
            sums.append(Likelihood(sum(p.logprob for p in parts), sum(p.tokens for p in parts)))
        return sums

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (context, continuation) so that the continuations concatenate to ``ids``."""
        limit = self.context_limit
        tokens = [self.prefix, *ids]
        for start in range(0, len(ids), limit):
            end = min(start + limit, len(ids))
            # the last token of a continuation is only predicted
            yield tokens[max(0, end - limit) : start + 1], ids[start:end]

    def _score(
        self, batch: PrefixBatch, continuations: list[list[int]], greedy: bool
    ) -> Iterator[tuple[float, bool | None]]:
        device = self.model.device
        keys = batch.keys and (batch.keys[0].to(device), batch.keys[1].to(device))
        hidden = self.model.hidden(
            batch.ids.to(device), cu_seqlens=batch.cu_seqlens.to(device), keys=keys
        )[0]
        # the token before a continuation predicts its first
        predicting_rows = [
            rows[-len(c) :] for rows, c in zip(batch.rows, continuations, strict=True)
        ]
        rows = hidden[torch.from_numpy(np.concatenate(predicting_rows)).to(device)]
        labels = torch.tensor([t for c in continuations for t in c], device=device)
        head = self._head
        if uses_split_float32(rows, head):  # one bfloat16 product with three times the columns
            rows, head = torch.cat(_halves(rows, "hhl"), 1), self._split_head
        logprobs = linear_logprobs(
            rows, head, labels, softcap=self.model.config.final_logit_softcapping
        )
        assert isinstance(logprobs, Tensor)  # a pair only with the entropy
        ends = np.cumsum([len(c) for c in continuations])
        logprobs_of = np.split(logprobs.double().cpu().numpy(), ends[:-1])
        likeliest = (
            self._likeliest(hidden, predicting_rows, continuations, logprobs_of) if greedy else None
        )
        for i, values in enumerate(logprobs_of):
            yield float(values.sum()), None if likeliest is None else likeliest[i]

    def _likeliest(
        self,
        hidden: Tensor,
        rows: list[np.ndarray],
        tokens: list[list[int]],
        logprobs: list[np.ndarray],
    ) -> list[bool]:
        """Return for each continuation True if all of its tokens are the likeliest ones.

        A token with a high probability is. The others are checked from the least likely one on:
        most continuations fail there, and those with a common prefix share its row.
        """
        order = [
            [int(j) for j in np.argsort(values) if not values[j] > _CERTAIN_LOGPROB]
            for values in logprobs
        ]
        all_likeliest, best = [True] * len(rows), dict[int, int]()
        remaining, step = [i for i, values in enumerate(order) if values], 0
        while remaining:
            row_numbers = sorted({int(rows[i][order[i][step]]) for i in remaining} - best.keys())
            for part in torch.tensor(row_numbers).split(_GREEDY_ROWS) if row_numbers else ():
                ids = self.model.logits(hidden[part.to(hidden.device)]).argmax(-1).tolist()
                best.update(zip(part.tolist(), ids))
            for i in remaining:
                index = order[i][step]
                all_likeliest[i] = best[int(rows[i][index])] == tokens[i][index]
            step += 1
            remaining = [i for i in remaining if all_likeliest[i] and step < len(order[i])]
        return all_likeliest

    @cached_property
    def _head(self) -> Tensor:
        return self.model.head_matrix(self.model.dtype)

    @cached_property
    def _split_head(self) -> Tensor:
        return torch.cat(_halves(self._head, "hlh"), 1)

    # answers

    def generate(
        self,
        prompts: Sequence[EvalPrompt],
        *,
        temperature: float = 0.0,
        on_result: Callable[[Completion], Any] | None = None,
    ) -> list[Completion]:
        """Answer each prompt, at temperature 0 with the likeliest tokens.

        A prompt that is too long to leave ``max_new_tokens`` of the context is truncated at its
        start (`Completion.truncated_prompt_tokens`). Where ``max_new_tokens`` is the context's
        length or more, the answer gets half of the context.

        An answer depends only on its prompt and seed, not on the other prompts. ``on_result`` is
        called with each answer as soon as it ends.
        """
        limit = min(self.context_limit, self._engine.context_limit)
        plain = iter(self.encode_texts([p.text for p in prompts if not p.chat]))
        requests, cuts = [], []
        for p in prompts:
            ids = self._chat(p.text, p.history) if p.chat else next(plain) or [self.prefix]
            max_new_tokens = p.max_new_tokens if p.max_new_tokens < limit else limit // 2
            cuts.append(max(0, len(ids) + max_new_tokens - limit))
            stop_ids, stop = self._stops(p.stop)
            sampling = p.sampling or Sampling(temperature)
            prompt_ids = ids[cuts[-1] :]
            requests.append(
                Request(
                    prompt_ids, max_new_tokens, sampling, seed=p.seed, stop=stop, stop_ids=stop_ids
                )
            )
        completions = self._engine.generate(requests, on_completion=on_result)
        if failed := [completion.error for completion in completions if completion.error]:
            raise RuntimeError(failed[0])
        return [
            replace(completion, truncated_prompt_tokens=cut)
            for completion, cut in zip(completions, cuts, strict=True)
        ]

    def _stops(self, strings: Sequence[str]) -> tuple[frozenset[int], tuple[str, ...]]:
        """Split stop strings into ids of special tokens and other strings."""
        names = self.tokenizer.special_tokens
        ids = [self.tokenizer.backend.token_to_id(s) for s in strings if s in names]
        plain = tuple(s for s in strings if s not in names)
        return frozenset(i for i in ids if i is not None), plain

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.model, self.tokenizer)


def _halves(x: Tensor, order: str) -> list[Tensor]:
    """Split float32 into "h", the nearest bfloat16, and "l", the bfloat16 of the remainder."""
    high = x.bfloat16()
    parts = {"h": high, "l": (x - high).bfloat16()}
    return [parts[name] for name in order]
