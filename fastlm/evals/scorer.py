"""What every evaluation asks of a model: how likely a text is after another, and what it answers.

Likelihoods come from forwards over packed sequences in which a common beginning is computed once
(`fastlm.evals.shared`); answers come from the engine, whose cache shares the pages of prompts that
begin alike.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastlm.decode.sampling import Sampling
from fastlm.errors import InputError
from fastlm.evals.shared import Batch, batches
from fastlm.ops import linear_logprobs
from fastlm.serve.engine import Engine
from fastlm.serve.requests import Request

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

Pair = tuple[str, str]
# Of a forward: products are at their full speed; 1.5 GB of activations at hidden size 4096
TOKENS = 4096
KEYS = 65536  # copied in each layer: 128 MB at 8 key heads of 128 in bfloat16
_GREEDY_ROWS = 256  # logits of so many tokens at once: 50 MB at a vocabulary of 49,152


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a continuation is after its context.

    logprob: nats, summed over its ``tokens``.
    greedy: whether each token was the likeliest; None where it was not asked for.
    cut: tokens of the context that did not fit and were left out, the first ones.
    """

    logprob: float
    tokens: int
    greedy: bool | None = None
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue, or with ``chat`` messages of a user to answer through the template."""

    text: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    chat: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """``ended``: at an end token or a stop string, which is not in ``text``."""

    text: str
    tokens: int
    ended: bool
    cut: int = 0


class Scorer:
    """A model and its tokenizer, for evaluations.

    Args:
        tokens: computed in one forward.

    A likelihood depends on what is scored in the same call, by rounding alone: callers that want
    the same bits again pass the same pairs.
    """

    def __init__(self, model: "CausalLM", tokenizer: "Tokenizer", *, tokens: int = TOKENS) -> None:
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens

    @property
    def context_limit(self) -> int:
        return self.model.context_limit

    @cached_property
    def start(self) -> list[int]:
        """What the tokenizer puts before a text: BOS, or nothing."""
        bos = self.tokenizer.bos_id
        return (
            [bos] if bos is not None and self.tokenizer.encode("a", special=True)[0] == bos else []
        )

    @cached_property
    def _empty(self) -> list[int]:
        """The context of a text that has none: BOS, else the end of another text."""
        for token in (self.tokenizer.bos_id, self.tokenizer.eos_id):
            if token is not None:
                return [token]
        raise InputError("context: wanted text, this model has no token to start from")

    # likelihoods

    def loglikelihoods(
        self,
        pairs: Sequence[Pair],
        *,
        chat: bool = False,
        greedy: bool = False,
        tick: Callable[[int], Any] | None = None,
    ) -> list[Likelihood]:
        """Return how likely each continuation is after its context, in the order of ``pairs``.

        Tokens are those of the joined text. Those that the context alone has are the context's;
        spaces at its end count as the continuation's (as in lm-evaluation-harness). A context that
        does not fit is cut at its beginning.

        Args:
            chat: a context is a user's message, the continuation the answer.
            greedy: also tell whether each token was the likeliest.
            tick: called with the number of pairs that are done.

        Raises InputError: an empty continuation, or one that does not fit alone.
        """
        return self.token_loglikelihoods(self.encode(pairs, chat=chat), greedy=greedy, tick=tick)

    def encode(
        self, pairs: Sequence[Pair], *, chat: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of each context and its continuation; see `loglikelihoods`."""
        moved = []
        for context, continuation in pairs:
            kept = context.rstrip()
            moved.append(
                (kept, context[len(kept) :] + continuation) if kept else ("", continuation)
            )
        if chat:
            contexts = {text: self._chat(text) for text, _ in moved}
            after = self.tokenizer.encode_batch([text for _, text in moved])
            return [(contexts[c], ids) for (c, _), ids in zip(moved, after, strict=True)]
        texts = list(dict.fromkeys([c for c, _ in moved] + [c + t for c, t in moved]))
        known = dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))
        found = []
        for context, continuation in moved:
            whole, before = known[context + continuation], known[context]
            found.append(
                ([*self.start, *before] or self._empty, whole[len(before) :])
                if context
                else (self.start or self._empty, whole)
            )
        return found

    def _chat(self, text: str) -> list[int]:
        return self.tokenizer.encode_chat([{"role": "user", "content": text}])

    def token_loglikelihoods(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        greedy: bool = False,
        tick: Callable[[int], Any] | None = None,
    ) -> list[Likelihood]:
        """`loglikelihoods` of token ids: (context, continuation), neither of them empty."""
        limit = self.context_limit
        sequences, continuations, cuts = [], [], []
        for i, (context, continuation) in enumerate(pairs):
            if not continuation:
                raise InputError(f"pairs[{i}]: wanted a continuation with a token, got none")
            if len(continuation) > limit:
                raise InputError(
                    f"pairs[{i}]: wanted a continuation of at most the context's {limit} tokens,"
                    f" got {len(continuation)}"
                )
            whole = [*context, *continuation][:-1]  # the last token is only predicted
            cuts.append(max(0, len(whole) - limit))
            sequences.append(whole[cuts[-1] :])
            continuations.append(list(continuation))
        found: list[Likelihood | None] = [None] * len(pairs)
        done = 0
        # frequencies that depend on the length of a context are those of the longest in a batch
        most = 1 if self.model.model.by_length else None
        with self._evaluating():
            for batch in batches(sequences, tokens=self.tokens, keys=KEYS, most=most):
                scored = self._score(batch, [continuations[i] for i in batch.members], greedy)
                for i, (logprob, likeliest) in zip(batch.members, scored, strict=True):
                    found[i] = Likelihood(logprob, len(continuations[i]), likeliest, cuts[i])
                done += len(batch.members)
                if tick is not None:
                    tick(done)
        return [one for one in found if one is not None]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Context: the model in eval mode, without gradients; afterwards as it was."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(training)

    def _score(
        self, batch: Batch, continuations: list[list[int]], greedy: bool
    ) -> Iterator[tuple[float, bool | None]]:
        device = self.model.device
        keys = batch.keys and (batch.keys[0].to(device), batch.keys[1].to(device))
        hidden = self.model.hidden(
            batch.ids.to(device), cu_seqlens=batch.cu_seqlens.to(device), keys=keys
        )[0]
        # the token before a continuation predicts its first
        chosen = [rows[-len(c) :] for rows, c in zip(batch.rows, continuations, strict=True)]
        rows = hidden[torch.from_numpy(np.concatenate(chosen)).to(device)]
        labels = torch.tensor([t for c in continuations for t in c], device=device)
        logprobs = linear_logprobs(
            rows, self._head, labels, softcap=self.model.config.final_logit_softcapping
        )
        assert isinstance(logprobs, Tensor)  # a pair only with the entropy
        likeliest = None
        if greedy:
            parts = zip(rows.split(_GREEDY_ROWS), labels.split(_GREEDY_ROWS))
            likeliest = torch.cat([self.model.logits(r).argmax(-1) == t for r, t in parts]).cpu()
        sums, start = logprobs.double().cpu(), 0
        for continuation in continuations:
            end = start + len(continuation)
            told = None if likeliest is None else bool(likeliest[start:end].all())
            yield float(sums[start:end].sum()), told
            start = end

    @cached_property
    def _head(self) -> Tensor:
        return self.model.head_matrix(self.model.dtype)

    # answers

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        temperature: float = 0.0,
        tick: Callable[[int], Any] | None = None,
    ) -> list[Written]:
        """Answer each prompt, at temperature 0 with the likeliest tokens. A prompt that leaves no
        room for its answer is cut at its beginning.

        An answer depends on its prompt and seed alone, not on the others.
        """
        requests, cuts = [], []
        for prompt in prompts:
            if prompt.chat:
                ids = self._chat(prompt.text)
            else:
                ids = [*self.start, *self.tokenizer.encode(prompt.text)] or self._empty
            room = min(prompt.max_new_tokens, self._engine.context_limit // 2)
            cut = max(0, len(ids) + room - self._engine.context_limit)
            cuts.append(cut)
            requests.append(
                Request(ids[cut:], room, Sampling(temperature), seed=prompt.seed, stop=prompt.stop)
            )
        done = 0

        def count(_: Any) -> None:
            nonlocal done
            done += 1
            if tick is not None:
                tick(done)

        results = self._engine.generate(requests, count)
        if failed := [result.error for result in results if result.error]:
            raise RuntimeError(failed[0])
        return [
            Written(r.text, len(r.tokens), r.finish_reason == "stop", cut)
            for r, cut in zip(results, cuts, strict=True)
        ]

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.model, self.tokenizer)
