"""What an engine computes next: one budget of tokens per step, without phases.

First the next token of every running answer, then prompts, as much of them as the budget allows,
then those of waiting requests. When pages run short, the request that was admitted last gives its
pages back and is computed again later: its prompt as before, then its answer token by token, so
that its numbers are the same to the bit.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from fastlm.decode.pages import PAGE, Pages
from fastlm.serve.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Compute the tokens [start, end) of a prompt."""

    sequence: Sequence
    start: int
    end: int


class Scheduler:
    """``waiting``: one queue per client; they take turns. ``running``: those with pages, in the
    order in which they were admitted."""

    def __init__(self, pages: Pages, *, max_rows: int, max_tokens: int, prefix_cache: bool):
        self.pages, self.max_rows, self.max_tokens = pages, max_rows, max_tokens
        self.prefix_cache = prefix_cache
        self.waiting: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def waiting_count(self) -> int:
        return sum(map(len, self.waiting.values()))

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
        self.pages.release(sequence.pages)
        sequence.pages = []

    def sequences(self) -> list[Sequence]:
        return [*self.running, *(s for queue in self.waiting.values() for s in queue)]

    def decodes(self) -> list[Sequence]:
        """The running sequences whose next token is computed in this step, each with a page for
        it."""
        for sequence in list(self.running):
            if sequence in self.running and sequence.decodes:
                self._make_room(sequence)
        return [s for s in self.running if s.decodes]

    def _make_room(self, sequence: Sequence) -> None:
        if sequence.computed < len(sequence.pages) * PAGE:
            return
        while (pages := self.pages.take(1)) is None:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return
        sequence.pages += pages

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0
        self.preemptions += 1
        queue = self.waiting.setdefault(sequence.request.client, deque())
        queue.appendleft(sequence)
        self.waiting.move_to_end(sequence.request.client, last=False)

    def chunks(self, budget: int) -> Iterator[Chunk]:
        """The prompts' part of a step. Each chunk is to be computed before the next is asked for,
        so that sequences of one step share their prefixes, too.

        Chunks end at a page's end or at the prompt's, and the tokens after its last full page are
        one of their own: products of so many rows have the same bits however many pages a chunk
        has, and a result does not depend on what else the engine did.
        """
        for sequence in list(self.running):
            while budget > 0 and sequence.pages and not sequence.decodes:
                chunk = self._next_chunk(sequence, budget)
                budget -= chunk.end - chunk.start
                yield chunk
        while budget > 0 and len(self.running) < self.max_rows:
            sequence = self._admit()
            if sequence is None:
                return
            while budget > 0 and sequence.pages and not sequence.decodes:
                chunk = self._next_chunk(sequence, budget)
                budget -= chunk.end - chunk.start
                yield chunk

    def _next_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start, whole = sequence.computed, sequence.prompt_length // PAGE * PAGE
        if start == whole:
            return Chunk(sequence, start, sequence.prompt_length)
        return Chunk(sequence, start, min(whole, start + max(budget // PAGE, 1) * PAGE))

    def _admit(self) -> Sequence | None:
        """Give pages to the next waiting sequence: for its prompt and its next token."""
        if not self.waiting:
            return None
        client, queue = next(iter(self.waiting.items()))
        sequence = queue[0]
        found: list[int] = []
        if self.prefix_cache:
            # the last token is computed in any case: its logits are wanted
            for key in sequence.keys[: (sequence.prompt_length - 1) // PAGE]:
                if (page := self.pages.find(key)) is None:
                    break
                found.append(page)
        needed = sequence.prompt_length // PAGE + 1 - len(found)
        # a page for each running answer's growth, or the newcomer would soon be preempted
        spare = len(self.running)
        pages = self.pages.take(needed) if needed + spare <= self.pages.available else None
        if pages is None:
            self.pages.release(found)
            return None
        queue.popleft()
        del self.waiting[client]
        if queue:
            self.waiting[client] = queue  # behind the other clients
        sequence.pages = found + pages
        sequence.computed = len(found) * PAGE
        sequence.cached = max(sequence.cached, sequence.computed)
        self.running.append(sequence)
        return sequence

    def computed(self, chunk: Chunk) -> None:
        """Note that a chunk has keys and values. Its full pages can be found from now on."""
        sequence = chunk.sequence
        sequence.computed = chunk.end
        if self.prefix_cache:
            for i in range(chunk.start // PAGE, chunk.end // PAGE):
                self.pages.remember(sequence.keys[i], sequence.pages[i])
