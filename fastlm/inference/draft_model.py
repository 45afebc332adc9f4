"""Speculative decoding with a draft model: a smaller model with the same vocabulary proposes the
next tokens (Leviathan et al. 2023, arXiv:2211.17192).

The draft model samples with the options of the request and with the random numbers that the request
will use next (common random numbers): where both models have similar distributions, they sample the
same tokens. The paper's rule of acceptance keeps the distribution. Here a draft token is accepted
if it equals the token that the model samples: that keeps each bit and rejects some tokens more.
Rejected: to propose the draft model's most likely token, which is accepted less often.

The draft model has a KV cache of its own. The keys and values of a rejected token are overwritten:
the sequence's length in this cache is cut to the accepted tokens.
"""

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastlm.errors import InputError
from fastlm.inference.block_manager import BLOCK_SIZE, BlockManager, block_bytes
from fastlm.inference.decode_batch import MAX_ROWS, DecodeBatch, DecodeRow
from fastlm.inference.sampler import Sampler, SamplerInput
from fastlm.inference.sequence import Sequence

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


def draft_block_bytes(draft: "CausalLM", model: "CausalLM") -> int:
    """Return the bytes of a block of the draft model. InputError: it cannot serve `model`."""
    if draft.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"draft_model: expected the model's vocabulary of {model.config.vocab_size} tokens,"
            f" got {draft.config.vocab_size}"
        )
    runner = draft.runner()
    reason = runner.fallback_reason
    if draft.model.depends_on_length:
        reason = "its rotary frequencies depend on the length of the context"
    if reason is None:
        return block_bytes(draft.config, runner.cache_dtype)
    raise InputError(f"draft_model: expected a model that runs on the decode kernel, got: {reason}")


@dataclass
class _DraftState:
    """The draft model's cache of a sequence: the blocks of ``block_table`` hold keys and values of
    its first ``length`` tokens, then of draft tokens ``draft``, which may be accepted."""

    block_table: list[int] = field(default_factory=list)
    length: int = 0
    draft: list[int] = field(default_factory=list)


class _DraftJob:
    """The work for a sequence in a step: compute ``new`` tokens and propose ``count``."""

    def __init__(self, sequence: Sequence, state: _DraftState, new: int, count: int):
        self.sequence, self.state, self.new, self.count = sequence, state, new, count
        self.draft: list[int] = []

    def begin(self) -> list[DecodeRow]:
        """Return the decode rows of the new tokens."""
        self.draft, self._generator = [], self.sequence.generator.clone_state()
        tokens, start = self.sequence.tokens, self.state.length
        rows = [(tokens[i], i) for i in range(start, start + self.new)]
        last = len(tokens) - 1 if self.count else -1
        return [DecodeRow(t, i, self.state.block_table, needs_logits=i == last) for t, i in rows]

    def sampler_input(self, row: int) -> SamplerInput:
        """Return how to sample a draft token from a row of logits. A grammar does not count."""
        return SamplerInput(row, self.sequence.options, self._generator)

    def draft_row(self) -> DecodeRow:
        """Return the decode row of the last draft token."""
        position = len(self.sequence.tokens) + len(self.draft) - 1
        return DecodeRow(self.draft[-1], position, self.state.block_table, needs_logits=True)


class DraftModelProposer:
    """Proposes up to ``num_speculative_tokens`` draft tokens with ``model``, which
    `draft_block_bytes` has checked. Its KV cache has ``num_blocks`` blocks.

    All running sequences are computed together: first the tokens that the draft model has not
    computed, those of prompts in chunks, then each draft token but the last. Nothing is proposed
    beyond the draft model's context, nor where its blocks run short.
    """

    def __init__(self, model: "CausalLM", num_blocks: int, num_speculative_tokens: int):
        self.model, self.failures = model, 0
        self.num_speculative_tokens = num_speculative_tokens
        self._states: dict[Sequence, _DraftState] = {}
        self._failed: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self.block_manager = BlockManager(model.config, num_blocks, dtype=model.dtype)
        self._sampler = Sampler()
        self._runner = self._batch = None
        self._follow_model()

    def prepare(self) -> None:
        try:
            self._follow_model()
        except Exception:  # answers run without draft tokens until weights change again
            self._runner = self._batch = None
            self.failures += 1

    def _follow_model(self) -> None:
        if self._runner is not None and self._runner.is_current():
            return
        self._runner, self._batch = self.model.runner(), None
        if self._runner.fallback_reason is None:
            dtype = self._runner.cache_dtype
            if dtype != self.block_manager.data.dtype:
                self.block_manager = BlockManager(
                    self.model.config, self.block_manager.num_blocks, dtype=dtype
                )
            self._batch = DecodeBatch(self._runner.decode_runner(self.block_manager))

    def release(self, sequence: Sequence) -> None:
        if (state := self._states.pop(sequence, None)) is not None:
            self.block_manager.release(state.block_table)

    def propose(self, sequences: list[Sequence], budget: int) -> None:
        for sequence in sequences:
            sequence.draft = []
        if budget < 1 or self._batch is None:
            return
        jobs: list[_DraftJob] = []
        try:
            jobs = self._jobs([s for s in sequences if s not in self._failed], budget)
            self._compute(jobs)
        except Exception:  # each sequence is tried alone, to find the one that fails
            for job in jobs:
                try:
                    self._compute([job])
                except Exception:
                    self.failures += 1
                    self._failed.add(job.sequence)
                    self.release(job.sequence)

    def _jobs(self, sequences: list[Sequence], budget: int) -> list[_DraftJob]:
        """Return the jobs of a step: answers first, then prompts, those with the fewest tokens left
        first."""
        jobs, rows = [], MAX_ROWS
        lags = {sequence: self._lag(sequence) for sequence in sequences}
        for sequence, lag in sorted(lags.items(), key=lambda item: item[1]):
            excess = len(sequence.tokens) - self.model.context_limit
            if excess > 0:
                self.release(sequence)
                continue
            new = min(lag, rows)
            limits = self.num_speculative_tokens, sequence.max_draft_tokens
            count = min(*limits, budget, 1 - excess)
            job = _DraftJob(sequence, self._states[sequence], new, count if new == lag else 0)
            if new and self._extend_block_table(job):
                jobs.append(job)
                rows -= new
                budget -= job.count
        return jobs

    def _lag(self, sequence: Sequence) -> int:
        """Compare draft tokens with the sequence. Return the number of tokens that the draft model
        has not computed."""
        state, tokens = self._states.setdefault(sequence, _DraftState()), sequence.tokens
        for token in state.draft:
            if state.length == len(tokens) or tokens[state.length] != token:
                break
            state.length += 1
        state.draft = []
        return len(tokens) - state.length

    def _extend_block_table(self, job: _DraftJob) -> bool:
        state = job.state
        length = state.length + job.new + max(job.count - 1, 0)
        missing = max(-(-length // BLOCK_SIZE) - len(state.block_table), 0)
        blocks = self.block_manager.allocate(missing)
        state.block_table += blocks or []
        return blocks is not None

    def _compute(self, jobs: list[_DraftJob]) -> None:
        assert self._batch is not None
        rows = [row for job in jobs for row in job.begin()]
        active = [job for job in jobs if job.count]
        while rows:
            logits = self._batch.logits(rows)
            inputs = [job.sampler_input(row) for row, job in enumerate(active)]
            for job, sampled in zip(active, self._sampler.sample(logits, inputs), strict=True):
                if sampled.token < 0:
                    raise InputError("draft_model: expected finite logits, got others")
                job.draft.append(sampled.token)
            active = [job for job in active if len(job.draft) < job.count]
            rows = [job.draft_row() for job in active]
        for job in jobs:
            job.sequence.draft, job.state.draft = job.draft, job.draft[:-1]
            job.state.length += job.new
