"""What an engine computes next: one budget of tokens per step, without phases.

First the next token of every running answer, then prompts, as much of them as the budget allows,
then those of waiting requests. When pages run short, the request that was admitted last gives its
pages back and is computed again later, so that its numbers are the same to the bit: all its tokens
as a prompt where prompts are rows of decode steps, else its prompt as before and then its answer
token by token.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastlm.inference.block_manager import BLOCK_SIZE, BlockManager
from fastlm.inference.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Compute the tokens [start, end) of a sequence; or copy what is known of them from `source`,
    which has the same prompt."""

    sequence: Sequence
    start: int
    end: int
    source: Sequence | None = None


class Scheduler:
    """``waiting``: one queue per client; they take turns. ``running``: those with pages, in the
    order in which they were admitted."""

    def __init__(self, pages: BlockManager, *, max_num_seqs: int, enable_prefix_caching: bool):
        self.pages, self.max_num_seqs, self.enable_prefix_caching = (
            pages,
            max_num_seqs,
            enable_prefix_caching,
        )
        self.by_pages = False  # see `chunks`
        self.answers_too = False  # tokens of answers have the keys and values of a prompt's
        self.freed: Callable[[Sequence], None] = lambda sequence: None  # told who has no pages now
        self.waiting: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._planned_keys: set[bytes] = set()  # of pages that this step computes

    @property
    def waiting_count(self) -> int:
        return sum(map(len, self.waiting.values()))

    def queued(self) -> list[Sequence]:
        """Those that wait; for any thread, since each copy is one operation of the interpreter."""
        return [sequence for queue in list(self.waiting.values()) for sequence in list(queue)]

    def add(self, sequence: Sequence) -> None:
        self.waiting.setdefault(sequence.request.client, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif (queue := self.waiting.get(sequence.request.client)) and sequence in queue:
            queue.remove(sequence)
            if not queue:
                del self.waiting[sequence.request.client]
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages = []
        self.freed(sequence)

    def begin(self) -> None:
        """Begin a step. What the last one planned and did not compute, it will not."""
        self._planned_keys.clear()
        for sequence in self.running:
            sequence.planned = sequence.computed

    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.queued()]

    def decodes(self) -> list[Sequence]:
        """The running sequences whose next token is computed in this step, each with a page for
        it."""
        for sequence in list(self.running):
            if sequence in self.running and sequence.decodes and sequence.held is None:
                self._make_room(sequence)
        return [s for s in self.running if s.decodes and s.held is None]

    def _make_room(self, sequence: Sequence) -> None:
        if sequence.computed < len(sequence.pages) * BLOCK_SIZE:
            return
        while (pages := self.pages.take(1)) is None:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return
        sequence.pages += pages

    def _preempt(self, sequence: Sequence) -> None:
        self.postpone(sequence)
        self.preemptions += 1

    def postpone(self, sequence: Sequence) -> None:
        """Let a running sequence wait again, before all others, without pages."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.computed = sequence.planned = 0
        sequence.prompt_logits, sequence.held, sequence.draft = None, None, []
        queue = self.waiting.setdefault(sequence.request.client, deque())
        queue.appendleft(sequence)
        self.waiting.move_to_end(sequence.request.client, last=False)

    def chunks(self, budget: int, admits: bool = True) -> Iterator[Chunk | None]:
        """The prompts' part of a step; without `admits`, of running sequences only. None: the
        chunks so far are to be computed before the next is asked for, since it begins with pages
        that they fill.

        With ``by_pages``, chunks end at a page's end or at the prompt's, and the tokens after its
        last full page are one of their own. The modules' products of so many rows, one or more
        pages, have the same bits whatever else they multiply, so a result does not depend on what
        else the engine did.
        """
        for sequence in list(self.running):
            while budget > 0 and sequence.pages and sequence.planned < sequence.known:
                chunk = self._next_chunk(sequence, budget)
                budget -= chunk.end - chunk.start
                yield chunk
        while admits and budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = next(iter(self.waiting.values()))[0]
            self._look_at(sequence)
            source = self._same_prompt(sequence)
            if source is None and self._waits(sequence):
                yield None
            if not self._admit(sequence, source):
                return
            if source is not None:
                sequence.planned = sequence.prompt_length
                yield Chunk(sequence, sequence.computed, sequence.prompt_length, source)
            while budget > 0 and sequence.pages and sequence.planned < sequence.known:
                chunk = self._next_chunk(sequence, budget)
                budget -= chunk.end - chunk.start
                yield chunk

    def _look_at(self, sequence: Sequence) -> None:
        """Before a waiting sequence is admitted: what of it is computed as a prompt. It may have
        run before, under other rules."""
        sequence.known = len(sequence.tokens) if self.answers_too else sequence.prompt_length
        del sequence.keys[sequence.known // BLOCK_SIZE :]

    def _next_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start, length = sequence.planned, sequence.known
        if self.by_pages and start < (whole := length // BLOCK_SIZE * BLOCK_SIZE):
            end = min(whole, start + max(budget // BLOCK_SIZE, 1) * BLOCK_SIZE)
        else:
            end = length if self.by_pages else min(length, start + budget)
        sequence.planned = end
        if self.enable_prefix_caching:
            self._planned_keys.update(sequence.keys[start // BLOCK_SIZE : end // BLOCK_SIZE])
        return Chunk(sequence, start, end)

    def _same_prompt(self, sequence: Sequence) -> Sequence | None:
        """A running sequence whose prompt is the same and computed, or will be in this step."""
        if not self.enable_prefix_caching or sequence.known > sequence.prompt_length:
            return None
        if sequence.scores_prompt:
            return None
        for other in reversed(self.running):
            told = other.prompt_logits is not None or other.computed < other.prompt_length
            if told and other.planned >= other.prompt_length and other.same_prompt(sequence):
                return other
        return None

    def _waits(self, sequence: Sequence) -> bool:
        """Whether this step computes a page that the sequence begins with."""
        return any(key in self._planned_keys for key in self._shareable(sequence))

    def _shareable(self, sequence: Sequence) -> list[bytes]:
        """Keys of pages that may be found; the last token is computed in any case, for its
        logits; all of them where the prompt is scored."""
        if sequence.scores_prompt:
            return []
        return sequence.keys[: (sequence.known - 1) // BLOCK_SIZE]

    def _admit(self, sequence: Sequence, source: Sequence | None) -> bool:
        """Give pages to the next waiting sequence, for its tokens and the next one. Whether there
        are enough."""
        found: list[int] = []
        if source is not None:
            found = self.pages.share(source.pages[: sequence.prompt_length // BLOCK_SIZE])
        elif self.enable_prefix_caching:
            for key in self._shareable(sequence):
                if (page := self.pages.find(key)) is None:
                    break
                found.append(page)
        # of a sequence that was preempted, for its answer so far, too
        needed = len(sequence.tokens) // BLOCK_SIZE + 1 - len(found)
        # a page for each running answer's growth, or the newcomer would soon be preempted
        spare = len(self.running)
        pages = self.pages.take(needed) if needed + spare <= self.pages.available else None
        if pages is None:
            self.pages.release(found)
            return False
        client = sequence.request.client
        queue = self.waiting.pop(client)
        queue.popleft()
        if queue:
            self.waiting[client] = queue  # behind the other clients
        sequence.pages = found + pages
        sequence.computed = sequence.planned = len(found) * BLOCK_SIZE
        if not sequence.admitted:  # else these pages may be its own
            sequence.admitted, sequence.cached = True, sequence.computed
            sequence.queued = time.monotonic() - sequence.submitted
        self.running.append(sequence)
        return True

    def computed(self, chunk: Chunk) -> None:
        """Note that a chunk has keys and values. Its full pages can be found from now on."""
        sequence = chunk.sequence
        sequence.computed = chunk.end
        if not self.enable_prefix_caching:
            return
        if self.answers_too:
            sequence.add_keys()
        for i in range(chunk.start // BLOCK_SIZE, min(chunk.end // BLOCK_SIZE, len(sequence.keys))):
            self._planned_keys.discard(sequence.keys[i])
            self.pages.remember(sequence.keys[i], sequence.pages[i])
