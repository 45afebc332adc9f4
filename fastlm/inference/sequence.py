"""The state of one request in an engine, from its prompt to its last token."""

import time
from collections.abc import Sequence as Tokens
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm.inference.answer_text import AnswerText, checked_stops
from fastlm.inference.block_manager import BLOCK_SIZE, block_keys
from fastlm.inference.masks import Masks
from fastlm.inference.requests import (
    Completion,
    FinishReason,
    Listener,
    Piece,
    Request,
    TokenLogprob,
)
from fastlm.inference.sampler import TokenOptions, token_logprob
from fastlm.inference.sampling import Adjustments, make_generators

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer


class Sequence:
    """``tokens``: the prompt and what was drawn. The first ``computed`` of them have keys and
    values in ``pages``; ``planned``: with those of the chunks of this step. The first ``known`` are
    computed as a prompt. ``keys``: of their full pages (`block_keys`). ``room``: the most tokens
    that may be drawn. ``prompt_logits`` (1, V): what follows the prompt, once computed. ``draft``:
    guesses of the next tokens, computed in this step. ``masks``: of its grammar, if it has one.
    ``held`` (V,): logits that wait for a mask; meanwhile nothing more is computed.
    """

    def __init__(
        self,
        id: int,
        request: Request,
        listener: Listener,
        *,
        tokenizer: "Tokenizer | None",
        ends: frozenset[int],
        room: int,
        vocab: int,
        device: torch.device,
        threads: Executor,
    ):
        self.id, self.request, self.listener = id, request, listener
        self.ends, self.room, self.device = ends, room, device
        self.tokens = list(request.prompt)
        self.prompt_length = self.known = len(self.tokens)
        self.pages: list[int] = []
        self.computed = self.planned = self.cached = 0
        self.prompt_logits: Tensor | None = None
        self.draft: list[int] = []
        self.keys: list[bytes] = []
        self._key_pages(len(self.tokens))
        self.submitted = time.monotonic()
        self.queued: float | None = None  # seconds until it got its pages
        self.ended = self.admitted = False
        (self.generator,) = make_generators(request.seed, 1)
        self.adjustments = None
        if request.sampling.adjusts:
            ids = torch.tensor([self.tokens], device=device)
            self.adjustments = Adjustments(request.sampling, ids, None, vocab)
        self.vocab = vocab
        self.options = TokenOptions(request.sampling, self.adjustments, ends, vocab)
        self.prompt_scores: list[TokenLogprob] = []
        self.text = (
            None if tokenizer is None else AnswerText(tokenizer, checked_stops(request.stop))
        )
        self.held: Tensor | None = None
        self.masks = None
        if request.constraint is not None:
            self.masks = Masks(request.constraint(), threads)

    @property
    def decodes(self) -> bool:
        """Whether its prompt is computed."""
        return self.computed >= self.known

    def token(self, i: int) -> int:
        """Token i, or a guess of it."""
        return self.tokens[i] if i < len(self.tokens) else self.draft[i - len(self.tokens)]

    @property
    def most_guesses(self) -> int:
        """How many tokens after the last may be guessed: as many as the answer and its pages have
        room for, and none while tokens before the last are computed."""
        if not self.decodes or self.computed + 1 != len(self.tokens):
            return 0
        left = self.room - (len(self.tokens) - self.prompt_length) - 1
        return max(0, min(left, len(self.pages) * BLOCK_SIZE - len(self.tokens)))

    def add_keys(self) -> None:
        """Add the keys of the pages that are full by now."""
        self._key_pages(self.computed)

    def _key_pages(self, end: int) -> None:
        """Add the keys of the pages that the first ``end`` tokens fill."""
        done = len(self.keys) * BLOCK_SIZE
        if end - done >= BLOCK_SIZE:
            before = self.keys[-1:] or [self.request.cache_salt]
            self.keys += block_keys(self.tokens[done:end], before)

    def same_prompt(self, other: "Sequence") -> bool:
        """Whether the other's computed prompt may be used for this one."""
        mine, theirs = self.prompt_length, other.prompt_length
        salts = self.request.cache_salt, other.request.cache_salt
        return (
            mine == theirs and salts[0] == salts[1] and self.tokens[:mine] == other.tokens[:theirs]
        )

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of its prompt are asked for."""
        return self.request.prompt_logprobs is not None

    @property
    def must_go_on(self) -> bool:
        """Whether no end token may come next."""
        return len(self.tokens) - self.prompt_length < self.request.min_new_tokens

    @property
    def late(self) -> bool:
        deadline = self.request.deadline
        return deadline is not None and time.monotonic() - self.submitted >= deadline

    def score(self, i: int, logits: Tensor) -> None:
        """Take the (V,) logits that follow token i of the prompt, in order; those that come again
        after a preemption are the same."""
        if i == len(self.prompt_scores) and i + 1 < self.prompt_length:
            count = self.request.prompt_logprobs or 0
            known = logits[None, : self.vocab].float()  # what may be drawn, as for answers
            self.prompt_scores.append(token_logprob(known, self.tokens[i + 1], count))

    def add(self, token: int, logprob: TokenLogprob | None) -> FinishReason | None:
        """Take the token that was drawn and tell the listener. Return why it was the last one."""
        self.tokens.append(token)
        ended = token in self.ends
        if self.adjustments is not None:
            self.adjustments.add(torch.tensor([token], device=self.device))
        text = ""
        if self.text is not None and not ended:
            text = self.text.push(token)
            ended = self.text.stopped
        told = [] if logprob is None else [logprob]
        reason: FinishReason | None = "stop" if ended else None
        if reason is None and len(self.tokens) - self.prompt_length >= self.room:
            reason = "length"
        first = len(self.tokens) == self.prompt_length + 1
        scores = self.prompt_scores if first else []
        if reason is None:
            if self.masks is not None:
                self.masks.accept(token)
            self._tell(Piece([token], text, told, prompt_logprobs=scores))
        else:
            self.end(reason, tokens=[token], text=text, logprobs=told, prompt_logprobs=scores)
        return reason

    def end(
        self,
        reason: FinishReason,
        error: str | None = None,
        *,
        tokens: Tokens[int] = (),
        text: str = "",
        logprobs: Tokens[TokenLogprob] = (),
        prompt_logprobs: Tokens[TokenLogprob] = (),
    ) -> None:
        """Tell the listener the last piece, once: text that was held back, and why it ends."""
        if self.ended:
            return
        self.ended = True
        if self.text is not None and not self.text.stopped:
            text += self.text.flush()
        self._tell(
            Piece(
                list(tokens), text, list(logprobs), reason, error, self.cached, self.prompt_length,
                self.queued, list(prompt_logprobs),
            )
        )  # fmt: skip

    def _tell(self, piece: Piece) -> None:
        try:
            self.listener(piece)
        except BaseException:
            self.ended = True  # it is told nothing more
            raise


class Collected:
    """A listener that joins the pieces of an answer to a `Completion`."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.completion: Completion | None = None

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish_reason is not None:
            self.completion = Completion(
                [token for p in self.pieces for token in p.tokens],
                "".join(p.text for p in self.pieces),
                [logprob for p in self.pieces for logprob in p.logprobs],
                piece.finish_reason,
                piece.error,
                piece.prompt_tokens,
                piece.cached_tokens,
            )
