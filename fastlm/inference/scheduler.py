"""The scheduler: it decides what an engine computes next, with one budget of tokens per step and
without phases (continuous batching).

A step computes the next token of every running answer, then as much of running prompts as the
budget allows, then the prompts of waiting requests. When blocks run short, the request that was
admitted last is preempted: it releases its blocks and is recomputed later, to the same bits. If the
decode kernel also computes prompts (`recomputes_as_prompt`), its prompt and answer are prefilled
together. Otherwise its prompt is prefilled, and its answer decoded again token by token.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastlm.inference.block_manager import BLOCK_SIZE, BlockManager
from fastlm.inference.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The tokens [start, end) of a sequence, to be computed in a step. With ``source``, a sequence
    that has the same prompt, they are copied from there."""

    sequence: Sequence
    start: int
    end: int
    source: Sequence | None = None


class Scheduler:
    """Decides what each step of an engine computes.

    ``waiting``: one queue per client; the queues take turns. ``running``: the sequences that
    have blocks, in the order in which they were admitted.
    """

    def __init__(
        self, block_manager: BlockManager, *, max_num_seqs: int, enable_prefix_caching: bool
    ):
        self.block_manager, self.max_num_seqs = block_manager, max_num_seqs
        self.enable_prefix_caching = enable_prefix_caching
        self.aligns_chunks = False  # see `schedule_prefills`
        self.recomputes_as_prompt = False  # a preempted answer is recomputed like a prompt
        self.on_free: Callable[[Sequence], None] = lambda sequence: None  # its blocks are released
        self.waiting: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._scheduled_hashes: set[bytes] = set()  # of blocks that this step computes

    @property
    def waiting_count(self) -> int:
        """The number of sequences that wait."""
        return sum(map(len, self.waiting.values()))

    def waiting_sequences(self) -> list[Sequence]:
        """Return the sequences that wait. Any thread may call it, since each copy is one operation
        of the interpreter."""
        return [sequence for queue in list(self.waiting.values()) for sequence in list(queue)]

    def add(self, sequence: Sequence) -> None:
        """Add a sequence to the queue of its client."""
        self.waiting.setdefault(sequence.request.client, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a running or waiting sequence, and release its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif (queue := self.waiting.get(sequence.request.client)) and sequence in queue:
            queue.remove(sequence)
            if not queue:
                del self.waiting[sequence.request.client]
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.block_manager.release(sequence.block_table)
        sequence.block_table = []
        self.on_free(sequence)

    def begin_step(self) -> None:
        """Begin a step. Discard what the last step scheduled and did not compute."""
        self._scheduled_hashes.clear()
        for sequence in self.running:
            sequence.num_scheduled = sequence.num_computed

    def sequences(self) -> list[Sequence]:
        """Return all sequences: those that run, then those that wait."""
        return [*self.running, *self.waiting_sequences()]

    def schedule_decodes(self) -> list[Sequence]:
        """Return the running sequences whose next token is computed in this step; each has a block
        for it. Preempts others where blocks run short."""
        for sequence in list(self.running):
            if (
                sequence in self.running
                and sequence.is_decoding
                and sequence.pending_logits is None
            ):
                self._extend_block_table(sequence)
        return [s for s in self.running if s.is_decoding and s.pending_logits is None]

    def _extend_block_table(self, sequence: Sequence) -> None:
        if sequence.num_computed < len(sequence.block_table) * BLOCK_SIZE:
            return
        while (blocks := self.block_manager.allocate(1)) is None:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return
        sequence.block_table += blocks

    def _preempt(self, sequence: Sequence) -> None:
        self.requeue(sequence)
        self.preemptions += 1

    def requeue(self, sequence: Sequence) -> None:
        """Release the blocks of a running sequence and let it wait, before all others."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.num_computed = sequence.num_scheduled = 0
        sequence.prompt_logits, sequence.pending_logits, sequence.draft = None, None, []
        queue = self.waiting.setdefault(sequence.request.client, deque())
        queue.appendleft(sequence)
        self.waiting.move_to_end(sequence.request.client, last=False)

    def schedule_prefills(self, budget: int, admits: bool = True) -> Iterator[Chunk | None]:
        """Yield the chunks of prompts of a step, with at most ``budget`` tokens; without
        ``admits``, of running sequences only. Yields None where the caller must compute the chunks
        so far before the next one, because that begins with blocks that they fill.

        With ``aligns_chunks``, chunks end at the end of a block or of the prompt, and the tokens
        after the last full block are a chunk of their own. The modules' products of one or more
        whole blocks have the same bits whatever else they multiply, so results are batch-invariant.
        """
        for sequence in list(self.running):
            while (
                budget > 0
                and sequence.block_table
                and sequence.num_scheduled < sequence.prefill_length
            ):
                chunk = self._next_chunk(sequence, budget)
                budget -= chunk.end - chunk.start
                yield chunk
        while admits and budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = next(iter(self.waiting.values()))[0]
            self._set_prefill_length(sequence)
            source = self._find_same_prompt(sequence)
            if source is None and self._needs_scheduled_block(sequence):
                yield None
            if not self._admit(sequence, source):
                return
            if source is not None:
                sequence.num_scheduled = sequence.prompt_length
                yield Chunk(sequence, sequence.num_computed, sequence.prompt_length, source)
            while (
                budget > 0
                and sequence.block_table
                and sequence.num_scheduled < sequence.prefill_length
            ):
                chunk = self._next_chunk(sequence, budget)
                budget -= chunk.end - chunk.start
                yield chunk

    def _set_prefill_length(self, sequence: Sequence) -> None:
        """Set how many tokens of a waiting sequence are computed as a prompt. The sequence may have
        run before, with another ``recomputes_as_prompt``."""
        sequence.prefill_length = (
            len(sequence.tokens) if self.recomputes_as_prompt else sequence.prompt_length
        )
        del sequence.block_hashes[sequence.prefill_length // BLOCK_SIZE :]

    def _next_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start, length = sequence.num_scheduled, sequence.prefill_length
        if self.aligns_chunks and start < (full := length // BLOCK_SIZE * BLOCK_SIZE):
            end = min(full, start + max(budget // BLOCK_SIZE, 1) * BLOCK_SIZE)
        else:
            end = length if self.aligns_chunks else min(length, start + budget)
        sequence.num_scheduled = end
        if self.enable_prefix_caching:
            self._scheduled_hashes.update(
                sequence.block_hashes[start // BLOCK_SIZE : end // BLOCK_SIZE]
            )
        return Chunk(sequence, start, end)

    def _find_same_prompt(self, sequence: Sequence) -> Sequence | None:
        """Return a running sequence that has the same prompt, computed before or in this step, or
        None."""
        if not self.enable_prefix_caching or sequence.prefill_length > sequence.prompt_length:
            return None
        if sequence.needs_prompt_logprobs:
            return None
        for other in reversed(self.running):
            has_logits = other.prompt_logits is not None or other.num_computed < other.prompt_length
            is_scheduled = other.num_scheduled >= other.prompt_length
            if has_logits and is_scheduled and other.has_same_prompt(sequence):
                return other
        return None

    def _needs_scheduled_block(self, sequence: Sequence) -> bool:
        """Return whether this step computes a block with which the sequence begins."""
        return any(hash in self._scheduled_hashes for hash in self._shareable_hashes(sequence))

    def _shareable_hashes(self, sequence: Sequence) -> list[bytes]:
        """Return the hashes of the blocks that may come from the cache. The last token is always
        computed, for its logits; all tokens are where the request wants prompt log-probabilities.
        """
        if sequence.needs_prompt_logprobs:
            return []
        return sequence.block_hashes[: (sequence.prefill_length - 1) // BLOCK_SIZE]

    def _admit(self, sequence: Sequence, source: Sequence | None) -> bool:
        """Allocate blocks for the tokens of the next waiting sequence and for the token after them.
        Return whether there are enough."""
        manager = self.block_manager
        shared: list[int] = []
        if source is not None:
            shared = manager.share(source.block_table[: sequence.prompt_length // BLOCK_SIZE])
        elif self.enable_prefix_caching:
            for hash in self._shareable_hashes(sequence):
                if (block := manager.find_cached(hash)) is None:
                    break
                shared.append(block)
        # a preempted sequence needs blocks for its answer so far, too
        missing = len(sequence.tokens) // BLOCK_SIZE + 1 - len(shared)
        # one block for the growth of each running answer, or this sequence would soon be preempted
        reserve = len(self.running)
        blocks = manager.allocate(missing) if missing + reserve <= manager.num_free else None
        if blocks is None:
            manager.release(shared)
            return False
        client = sequence.request.client
        queue = self.waiting.pop(client)
        queue.popleft()
        if queue:
            self.waiting[client] = queue  # behind the other clients
        sequence.block_table = shared + blocks
        sequence.num_computed = sequence.num_scheduled = len(shared) * BLOCK_SIZE
        if not sequence.was_admitted:  # a preempted sequence may find its own blocks
            sequence.was_admitted, sequence.num_cached = True, sequence.num_computed
            sequence.queue_seconds = time.monotonic() - sequence.submit_time
        self.running.append(sequence)
        return True

    def mark_computed(self, chunk: Chunk) -> None:
        """Record that a chunk is computed, and cache its full blocks."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        if not self.enable_prefix_caching:
            return
        if self.recomputes_as_prompt:
            sequence.hash_computed_blocks()
        end = min(chunk.end // BLOCK_SIZE, len(sequence.block_hashes))
        for i in range(chunk.start // BLOCK_SIZE, end):
            self._scheduled_hashes.discard(sequence.block_hashes[i])
            self.block_manager.cache(sequence.block_hashes[i], sequence.block_table[i])
