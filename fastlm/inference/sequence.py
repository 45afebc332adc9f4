"""The state of one request in an engine, from its prompt to its last token."""

import time
from collections.abc import Sequence as Tokens
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm.inference.answer_text import AnswerText, check_stop_strings
from fastlm.inference.block_manager import BLOCK_SIZE, hash_blocks
from fastlm.inference.requests import (
    Completion,
    FinishReason,
    Listener,
    Piece,
    Request,
    TokenLogprob,
)
from fastlm.inference.sampler import SamplerOptions, token_logprob
from fastlm.inference.sampling import LogitsProcessor, make_generators
from fastlm.inference.token_masks import TokenMasks

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer


class Sequence:
    """A prompt with its answer so far.

    tokens: the prompt and the sampled tokens.
    block_table: the blocks of their keys and values.
    num_computed: the number of first tokens whose keys and values are computed; num_scheduled: with
        those of the chunks of this step.
    prefill_length: the number of first tokens that are computed as a prompt.
    block_hashes: hashes of the full blocks (`hash_blocks`).
    max_new_tokens: the number of tokens that may be sampled.
    prompt_logits: (1, V), the logits after the prompt, once they are computed.
    draft: proposed next tokens, which are computed in this step.
    masks: the token masks of its grammar, if it has one.
    pending_logits: (V,), logits that wait for a mask; the sequence pauses meanwhile.
    """

    def __init__(
        self,
        id: int,
        request: Request,
        listener: Listener,
        *,
        tokenizer: "Tokenizer | None",
        stop_ids: frozenset[int],
        max_new_tokens: int,
        vocab: int,
        device: torch.device,
        threads: Executor,
    ):
        self.id, self.request, self.listener = id, request, listener
        self.stop_ids, self.max_new_tokens, self.device = stop_ids, max_new_tokens, device
        self.tokens = list(request.prompt)
        self.prompt_length = self.prefill_length = len(self.tokens)
        self.block_table: list[int] = []
        self.num_computed = self.num_scheduled = self.num_cached = 0
        self.prompt_logits: Tensor | None = None
        self.draft: list[int] = []
        self.block_hashes: list[bytes] = []
        self._hash_blocks(len(self.tokens))
        self.submit_time = time.monotonic()
        self.queue_seconds: float | None = None  # seconds until it got its blocks
        self.is_finished = self.was_admitted = False
        (self.generator,) = make_generators(request.seed, 1)
        self.logits_processor = None
        if request.sampling.has_adjustments:
            ids = torch.tensor([self.tokens], device=device)
            self.logits_processor = LogitsProcessor(request.sampling, ids, None, vocab)
        self.vocab = vocab
        self.options = SamplerOptions(request.sampling, self.logits_processor, stop_ids, vocab)
        self.prompt_logprobs: list[TokenLogprob] = []
        self.text = (
            None if tokenizer is None else AnswerText(tokenizer, check_stop_strings(request.stop))
        )
        self.pending_logits: Tensor | None = None
        self.masks: TokenMasks | None = None
        if request.constraint is not None:
            self.masks = TokenMasks(request.constraint(), threads)

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt is computed, so that its answer is decoded."""
        return self.num_computed >= self.prefill_length

    def token(self, i: int) -> int:
        """Return token i, which may be a draft token."""
        return self.tokens[i] if i < len(self.tokens) else self.draft[i - len(self.tokens)]

    @property
    def max_draft_tokens(self) -> int:
        """The number of draft tokens that the limit of the answer and its blocks allow; 0 while
        tokens before the last one are computed."""
        if not self.is_decoding or self.num_computed + 1 != len(self.tokens):
            return 0
        remaining = self.max_new_tokens - (len(self.tokens) - self.prompt_length) - 1
        return max(0, min(remaining, len(self.block_table) * BLOCK_SIZE - len(self.tokens)))

    def hash_computed_blocks(self) -> None:
        """Add the hashes of the blocks that are full now."""
        self._hash_blocks(self.num_computed)

    def _hash_blocks(self, end: int) -> None:
        """Add the hashes of the blocks that the first ``end`` tokens fill."""
        start = len(self.block_hashes) * BLOCK_SIZE
        if end - start >= BLOCK_SIZE:
            parents = self.block_hashes[-1:] or [self.request.cache_salt]
            self.block_hashes += hash_blocks(self.tokens[start:end], parents)

    def has_same_prompt(self, other: "Sequence") -> bool:
        """Return whether this sequence may use the computed prompt of ``other``."""
        length = self.prompt_length
        return (
            length == other.prompt_length
            and self.request.cache_salt == other.request.cache_salt
            and self.tokens[:length] == other.tokens[:length]
        )

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether the request asks for log-probabilities of the prompt."""
        return self.request.prompt_logprobs is not None

    @property
    def must_continue(self) -> bool:
        """Whether no stop token may come next."""
        return len(self.tokens) - self.prompt_length < self.request.min_new_tokens

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        deadline = self.request.deadline
        return deadline is not None and time.monotonic() - self.submit_time >= deadline

    def add_prompt_logprob(self, i: int, logits: Tensor) -> None:
        """Add the log-probability of the token after token i of the prompt, from its (V,) logits.
        Logits that are recomputed after a preemption are the same and are ignored."""
        if i == len(self.prompt_logprobs) and i + 1 < self.prompt_length:
            count = self.request.prompt_logprobs or 0
            drawable = logits[None, : self.vocab].float()  # as for answers
            self.prompt_logprobs.append(token_logprob(drawable, self.tokens[i + 1], count))

    def append(self, token: int, logprob: TokenLogprob | None) -> FinishReason | None:
        """Append a sampled token and call the listener. Return why it was the last one, or None."""
        self.tokens.append(token)
        stopped = token in self.stop_ids
        if self.logits_processor is not None:
            self.logits_processor.add(torch.tensor([token], device=self.device))
        text = ""
        if self.text is not None and not stopped:
            text = self.text.push(token)
            stopped = self.text.stopped
        logprobs = [] if logprob is None else [logprob]
        reason: FinishReason | None = "stop" if stopped else None
        if reason is None and len(self.tokens) - self.prompt_length >= self.max_new_tokens:
            reason = "length"
        is_first = len(self.tokens) == self.prompt_length + 1
        prompt_logprobs = self.prompt_logprobs if is_first else []
        if reason is None:
            if self.masks is not None:
                self.masks.accept(token)
            self._notify(Piece([token], text, logprobs, prompt_logprobs=prompt_logprobs))
        else:
            self.finish(
                reason, tokens=[token], text=text, logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )  # fmt: skip
        return reason

    def finish(
        self,
        reason: FinishReason,
        error: str | None = None,
        *,
        tokens: Tokens[int] = (),
        text: str = "",
        logprobs: Tokens[TokenLogprob] = (),
        prompt_logprobs: Tokens[TokenLogprob] = (),
    ) -> None:
        """Call the listener with the last piece, once: the rest of the text, and why it ends."""
        if self.is_finished:
            return
        self.is_finished = True
        if self.text is not None and not self.text.stopped:
            text += self.text.flush()
        self._notify(
            Piece(
                list(tokens), text, list(logprobs), reason, error, self.num_cached,
                self.prompt_length, self.queue_seconds, list(prompt_logprobs),
            )
        )  # fmt: skip

    def _notify(self, piece: Piece) -> None:
        try:
            self.listener(piece)
        except BaseException:
            self.is_finished = True  # the listener is not called again
            raise


class CompletionCollector:
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
