"""Guesses of a draft model: a smaller one with the same tokens, which writes a few tokens ahead
(speculative decoding: Leviathan et al. 2023, arXiv:2211.17192).

It draws as the request does, with the random numbers that the request will draw with next
(common random numbers): where both models think alike, they draw alike. Their rule of acceptance
keeps the distribution; here a guess must equal what the model draws, which keeps each bit, and
costs some guesses.
Rejected: guessing the draft model's likeliest token, which is drawn less often.

Its keys and values are in pages of its own. A rejected guess is overwritten: the sequence's length
in these pages is cut to what came true.
"""

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastlm.errors import InputError
from fastlm.inference.block_manager import BLOCK_SIZE, BlockManager, page_bytes
from fastlm.inference.decode_batch import MAX_ROWS, DecodeBatch, DecodeRow
from fastlm.inference.sampler import NextToken, Sampler
from fastlm.inference.sequence import Sequence

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


def draft_page_bytes(draft: "CausalLM", model: "CausalLM") -> int:
    """Return the bytes of a page of the draft model. InputError: it cannot guess for `model`."""
    if draft.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"draft_model: expected the model's vocabulary of {model.config.vocab_size} tokens,"
            f" got {draft.config.vocab_size}"
        )
    runner = draft.runner()
    why_not = runner.fallback_reason
    if draft.model.depends_on_length:
        why_not = "its rotary frequencies depend on the length of the context"
    if why_not is None:
        return page_bytes(draft.config, runner.cache_dtype)
    raise InputError(f"draft_model: expected one whose tokens can be rows of steps, got: {why_not}")


@dataclass
class _Held:
    """``pages`` hold keys and values of a sequence's first ``length`` tokens, then of guesses
    ``ahead``, which may have come true."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    ahead: list[int] = field(default_factory=list)


class _Job:
    """Compute ``new`` tokens of a sequence and guess ``count``."""

    def __init__(self, sequence: Sequence, held: _Held, new: int, count: int):
        self.sequence, self.held, self.new, self.count = sequence, held, new, count
        self.guesses: list[int] = []

    def begin(self) -> list[DecodeRow]:
        """Return the rows of the new tokens."""
        self.guesses, self._generator = [], self.sequence.generator.clone_state()
        tokens, begin = self.sequence.tokens, self.held.length
        rows = [(tokens[i], i) for i in range(begin, begin + self.new)]
        last = len(tokens) - 1 if self.count else -1
        return [DecodeRow(t, i, self.held.pages, needs_logits=i == last) for t, i in rows]

    def next_token(self, row: int) -> NextToken:
        """How to guess from a row of logits. A grammar does not count."""
        return NextToken(row, self.sequence.options, self._generator)

    def guessed(self) -> DecodeRow:
        """The last guess."""
        position = len(self.sequence.tokens) + len(self.guesses) - 1
        return DecodeRow(self.guesses[-1], position, self.held.pages, needs_logits=True)


class DraftModelProposer:
    """Guesses up to ``most`` tokens with ``model``, for which `draft_page_bytes` found no reason
    against; ``count``: of its pages.

    All running sequences are computed together: first the tokens that the draft model has not seen,
    those of prompts in chunks, then each guess but the last. There are no guesses beyond the draft
    model's context, nor where its pages run short.
    """

    def __init__(self, model: "CausalLM", count: int, most: int):
        self.model, self.most, self.failures = model, most, 0
        self._held: dict[Sequence, _Held] = {}
        self._failed: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self.pages = BlockManager(model.config, count, dtype=model.dtype)
        self._sampler = Sampler()
        self._runner = self._batch = None
        self._follow()

    def prepare(self) -> None:
        try:
            self._follow()
        except Exception:  # answers run without guesses until weights change again
            self._runner = self._batch = None
            self.failures += 1

    def _follow(self) -> None:
        if self._runner is not None and self._runner.is_current():
            return
        self._runner, self._batch = self.model.runner(), None
        if self._runner.fallback_reason is None:
            dtype = self._runner.cache_dtype
            if dtype != self.pages.data.dtype:
                self.pages = BlockManager(self.model.config, self.pages.count, dtype=dtype)
            self._batch = DecodeBatch(self._runner.decode_runner(self.pages))

    def forget(self, sequence: Sequence) -> None:
        if (held := self._held.pop(sequence, None)) is not None:
            self.pages.release(held.pages)

    def propose(self, sequences: list[Sequence], budget: int) -> None:
        for sequence in sequences:
            sequence.draft = []
        if budget < 1 or self._batch is None:
            return
        jobs: list[_Job] = []
        try:
            jobs = self._jobs([s for s in sequences if s not in self._failed], budget)
            self._compute(jobs)
        except Exception:  # whose fault it is shows alone
            for job in jobs:
                try:
                    self._compute([job])
                except Exception:
                    self.failures += 1
                    self._failed.add(job.sequence)
                    self.forget(job.sequence)

    def _jobs(self, sequences: list[Sequence], budget: int) -> list[_Job]:
        """Answers first, then prompts, the nearest to their ends first."""
        jobs, rows = [], MAX_ROWS
        lags = {sequence: self._lag(sequence) for sequence in sequences}
        for sequence, lag in sorted(lags.items(), key=lambda item: item[1]):
            beyond = len(sequence.tokens) - self.model.context_limit
            if beyond > 0:
                self.forget(sequence)
                continue
            new = min(lag, rows)
            count = min(self.most, budget, sequence.most_guesses, 1 - beyond)
            job = _Job(sequence, self._held[sequence], new, count if new == lag else 0)
            if new and self._make_room(job):
                jobs.append(job)
                rows -= new
                budget -= job.count
        return jobs

    def _lag(self, sequence: Sequence) -> int:
        """Tokens that the draft model has not seen, once guesses are compared with what came."""
        held, tokens = self._held.setdefault(sequence, _Held()), sequence.tokens
        for guess in held.ahead:
            if held.length == len(tokens) or tokens[held.length] != guess:
                break
            held.length += 1
        held.ahead = []
        return len(tokens) - held.length

    def _make_room(self, job: _Job) -> bool:
        held = job.held
        last = held.length + job.new + max(job.count - 1, 0)
        more = self.pages.take(max(-(-last // BLOCK_SIZE) - len(held.pages), 0))
        held.pages += more or []
        return more is not None

    def _compute(self, jobs: list[_Job]) -> None:
        assert self._batch is not None
        rows = [row for job in jobs for row in job.begin()]
        going = [job for job in jobs if job.count]
        while rows:
            logits = self._batch.logits(rows)
            tokens = [job.next_token(row) for row, job in enumerate(going)]
            for job, choice in zip(going, self._sampler.choose(logits, tokens), strict=True):
                if choice.token < 0:
                    raise InputError("draft_model: expected finite logits, got others")
                job.guesses.append(choice.token)
            going = [job for job in going if len(job.guesses) < job.count]
            rows = [job.guessed() for job in going]
        for job in jobs:
            job.sequence.draft, job.held.ahead = job.guesses, job.guesses[:-1]
            job.held.length += job.new
