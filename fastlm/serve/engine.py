"""An engine that continues many prompts at once, each with its own options, on pages of keys and
values (`fastlm.decode.pages`), one step after the other (`fastlm.serve.scheduler`).

A request's tokens and log-probabilities do not depend on what else the engine runs, on the CPU and
where `fastlm.decode.cpu_steps.why_not` has no objection: products of a prompt's pages and rows of a
decode step have the same bits in any company.
"""

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fastlm.decode import cpu_steps
from fastlm.decode.generation import checked_stops
from fastlm.decode.paged_call import ModuleSteps
from fastlm.decode.pages import PAGE, ChunkCache, Pages
from fastlm.errors import InputError
from fastlm.serve import sequence as sequences
from fastlm.serve.requests import EngineStats, FinishReason, Listener, QueueFull, Request, Result
from fastlm.serve.scheduler import Chunk, Scheduler
from fastlm.serve.sequence import Collected

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
_CACHE_SHARE = 4  # the cache takes a quarter of the memory at most


class Engine:
    """Continue prompts with `model`.

    Args:
        tokenizer: makes text of tokens; without one, answers have no text and no stop strings.
        pages: of `PAGE` tokens in the cache; by default as many as `max_rows` contexts need, within
            a quarter of the memory (of a GPU's free memory: half). Memory is taken at first use.
        max_tokens_per_step: a step computes so many tokens of answers and prompts, up to the end of
            a page. More is faster for prompts; fewer keep the pauses in running answers short.
        max_rows: requests that run at the same time.
        max_waiting: requests that may wait; beyond it, `submit` raises `QueueFull`.
        kv_dtype: of keys and values: float32, bfloat16 or float16. By default the model's, float16
            where its activations are rounded to 8 bits.
        prefix_cache: share the pages of prompts that begin with the same tokens.
        invariant: a request's result has the same bits in any company. Without it, a step computes
            all its prompts in one product.

    `submit`, `cancel`, `call` and `stats` are for any thread. Steps run in one thread: that of
    `start`, or that of the caller of `step` and `generate`. Weights may change while nothing runs
    (`call` waits for that moment): the engine notices, and forgets the prompts that it cached.

    Raises InputError: a model whose rotary frequencies depend on the length of the context
    (`dynamic`, `longrope`), options out of range.
    """

    def __init__(
        self,
        model: "CausalLM",
        tokenizer: "Tokenizer | None" = None,
        *,
        pages: int | None = None,
        max_tokens_per_step: int = 256,
        max_rows: int = 64,
        max_waiting: int = 1024,
        kv_dtype: torch.dtype | None = None,
        prefix_cache: bool = True,
        invariant: bool = True,
    ):
        if model.model.by_length:
            raise InputError(
                "model: wanted rotary frequencies that do not depend on the length of the context,"
                f" got {model.config.rope_parameters.get('rope_type')}"
            )
        for name, value in (
            ("max_tokens_per_step", max_tokens_per_step), ("max_rows", max_rows), ("pages", pages),
            ("max_waiting", max_waiting),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise InputError(f"{name}: wanted at least 1, got {value}")
        if kv_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"kv_dtype: wanted float32, bfloat16 or float16, got {kv_dtype}")
        self.model, self.tokenizer, self.kv_dtype = model, tokenizer, kv_dtype
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.max_tokens_per_step = max_tokens_per_step
        self.context_limit = model.context_limit
        self._ends = model.config.stop_ids | (tokenizer.stop_ids if tokenizer else frozenset())
        self._state: Any = None  # of the model, when its steps were made
        dtype = self._cache_dtype()
        count = pages or _page_count(model, dtype, max_rows)
        self.pages = Pages(model.config, count, dtype=dtype, device=model.device)
        self.scheduler = Scheduler(
            self.pages, max_rows=max_rows, prefix_cache=prefix_cache, invariant=invariant
        )
        self._changed = threading.Condition()  # guards what follows
        self._ids = itertools.count(1)
        self._inbox: list[sequences.Sequence] = []
        self._calls: list[tuple[Callable[[], Any], Future]] = []
        self._cancelled: set[int] = set()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._steps = self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._finished: Counter[str] = Counter()
        self._rate = 0.0  # tokens per second, of late

    # any thread

    def submit(self, request: Request, listener: Listener) -> int:
        """Queue a request; return its id. `listener` is called in the engine's thread with each
        `Piece`; the last has a finish_reason. An error that it raises cancels the request.

        Raises InputError: a prompt without tokens or room for an answer, ids out of range, a
        request that no page is left for even alone. QueueFull: see `max_waiting`.
        """
        room = self._checked(request)
        with self._changed:
            if self._closed:
                raise InputError("engine: wanted one that runs, got one that was closed")
            waiting = len(self._inbox) + self.scheduler.waiting_count
            if waiting >= self.max_waiting:
                raise QueueFull(waiting, self._retry_after())
            id = next(self._ids)
        sequence = sequences.Sequence(
            id, request, listener, tokenizer=self.tokenizer, room=room,
            ends=request.stop_ids | (frozenset() if request.ignore_eos else self._ends),
            vocab=self.model.config.vocab_size,
        )  # fmt: skip
        with self._changed:
            self._inbox.append(sequence)
            self._changed.notify_all()
        return id

    def cancel(self, id: int) -> None:
        """End a request after the step that runs; nothing happens if it has ended."""
        with self._changed:
            self._cancelled.add(id)
            self._changed.notify_all()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` in the engine's thread, between two steps: embeddings, say. To change
        weights, wait until nothing runs (`stats`)."""
        future: Future[T] = Future()
        with self._changed:
            self._calls.append((function, future))
            self._changed.notify_all()
        return future

    def stats(self) -> EngineStats:
        """Return counters and what the engine holds; while a step runs, of its middle."""
        scheduler, pages = self.scheduler, self.pages
        used = pages.count - pages.available
        with self._changed:
            waiting = len(self._inbox)
        return EngineStats(
            len(scheduler.running), waiting + scheduler.waiting_count, pages.count, used,
            pages.idle, self._steps, self._prompt_tokens, self._cached_tokens, self._new_tokens,
            scheduler.preemptions, dict(self._finished),
        )  # fmt: skip

    def generate(
        self, requests: Sequence[Request], on_result: Callable[[Result], Any] | None = None
    ) -> list[Result]:
        """Answer all requests, in their order; here, or through the thread that `start` began.
        `on_result` is called with each as it ends."""
        done = threading.Event()
        answers = [Collected() for _ in requests]
        left = itertools.count(len(requests) - 1, -1)

        def listen(answer: Collected) -> Listener:
            def take(piece: Any) -> None:
                answer(piece)
                if answer.result is None:
                    return
                if on_result is not None:
                    on_result(answer.result)
                if next(left) == 0:
                    done.set()

            return take

        ids: list[int] = []
        try:
            for request, answer in zip(requests, answers, strict=True):
                ids.append(self.submit(request, listen(answer)))
            if self._thread is None:
                while self.step():
                    pass
            elif requests:
                done.wait()
        except BaseException:
            for id in ids:
                self.cancel(id)
            raise
        return [answer.result for answer in answers if answer.result is not None]

    def start(self) -> None:
        """Step in a thread of its own until `close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fastlm-engine", daemon=True)
            self._thread.start()

    def close(self, *, drain: float = 0.0) -> None:
        """Take no more requests, wait up to `drain` seconds for those that there are, and end the
        rest as cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        until = time.monotonic() + drain
        thread = self._thread
        while thread is not None and self._busy() and time.monotonic() < until:
            time.sleep(0.01)
        with self._changed:
            self._thread = None
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        self._take_in()
        for sequence in self.scheduler.sequences():
            self._end(sequence, "cancelled")
        for _, future in self._calls:
            future.cancel()
        self._calls.clear()

    # the engine's thread

    def step(self) -> bool:
        """Compute one step. Whether there was anything to do."""
        busy = self._take_in()
        for sequence in self.scheduler.sequences():
            if sequence.cancelled or sequence.late:
                self._end(sequence, "cancelled" if sequence.cancelled else "deadline")
        if not self.scheduler.sequences():
            return busy
        if not self.scheduler.running:
            self._prepare()
        began, before = time.monotonic(), self._prompt_tokens + self._new_tokens
        decodes = self.scheduler.decodes()
        planned: list[Chunk] = []
        for chunk in self.scheduler.chunks(self.max_tokens_per_step - len(decodes)):
            if chunk is not None:
                planned.append(chunk)
                continue
            self._prefill(planned)
            planned = []
        self._prefill(planned)
        decodes = [s for s in decodes if s.pages]
        if decodes:
            self._guarded(decodes, lambda: self._decode(decodes))
        self._steps += 1
        count = self._prompt_tokens + self._new_tokens - before
        self._rate += 0.1 * (count / max(time.monotonic() - began, 1e-6) - self._rate)
        return True

    def _take_in(self) -> bool:
        """Take what other threads asked for. Whether there was anything."""
        with self._changed:
            inbox, self._inbox = self._inbox, []
            calls, self._calls = self._calls, []
            cancelled, self._cancelled = self._cancelled, set()
        for sequence in inbox:
            self.scheduler.add(sequence)
        for sequence in self.scheduler.sequences() if cancelled else ():
            sequence.cancelled |= sequence.id in cancelled
        for function, future in calls:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        return bool(inbox or calls)

    def _prepare(self) -> None:
        """Before the first sequence runs: follow the model, which may have changed."""
        state = cpu_steps.state_of(self.model)
        if state == self._state:
            return
        self.model.model.fuse()
        dtype = self._cache_dtype()
        if dtype != self.pages.data.dtype or self.model.device != self.pages.data.device:
            self.pages = self.scheduler.pages = Pages(
                self.model.config, self.pages.count, dtype=dtype, device=self.model.device
            )
        self.pages.forget()
        plan = cpu_steps.plan_of(self.model)
        self._decoder = (
            ModuleSteps(self.model, self.pages)
            if plan is None
            else cpu_steps.PagedSteps(self.model, plan, self.pages.data)
        )
        self._state = state

    def _cache_dtype(self) -> torch.dtype:
        plan = cpu_steps.plan_of(self.model)
        if plan is None:  # the modules' attention wants keys of its own dtype
            return self.model.dtype
        return self.kv_dtype or plan.cache_dtype

    def _guarded(self, group: list[sequences.Sequence], compute: Callable[[], None]) -> None:
        """Compute something for a group of sequences; if that fails, they end, not the engine."""
        try:
            compute()
        except Exception as error:
            for sequence in group:
                if sequence.pages:
                    self._end(sequence, "error", f"{type(error).__name__}: {error}")

    def _prefill(self, planned: list[Chunk]) -> None:
        """Compute the chunks of a step: full pages of all sequences packed, then what is left of
        each prompt, then copies."""
        computed = [c for c in planned if c.source is None]
        if self.scheduler.invariant:
            packed = [c for c in computed if c.end % PAGE == 0]
            groups = [packed, *([c] for c in computed if c.end % PAGE)]
        else:
            groups = [computed]
        for group in groups:
            if group := [c for c in group if c.sequence.pages]:  # no error so far
                self._guarded([c.sequence for c in group], lambda group=group: self._fill(group))
        for chunk in planned:
            if chunk.source is not None and chunk.sequence.pages:
                self._guarded([chunk.sequence], lambda chunk=chunk: self._copy(chunk))
        # not before the copies: an answer of one token gives its pages back
        last = [c.sequence for c in planned if c.end == c.sequence.prompt_length]
        begun = [s for s in last if s.pages and s.decodes]
        for sequence in begun:
            self._cached_tokens += sequence.cached
        if fresh := [s for s in begun if len(s.tokens) == s.prompt_length]:  # not computed again
            rows = [s.prompt_logits for s in fresh if s.prompt_logits is not None]
            self._sample(fresh, torch.cat(rows))

    @torch.inference_mode()
    def _fill(self, group: list[Chunk]) -> None:
        ids = [token for c in group for token in c.sequence.tokens[c.start : c.end]]
        cache = ChunkCache(
            self.pages, [c.sequence.pages for c in group],
            [c.start for c in group], [c.end for c in group],
        )  # fmt: skip
        hidden = self.model.chunk_hidden(torch.tensor(ids, device=self.model.device), cache)
        self._prompt_tokens += len(ids)
        for row, chunk in enumerate(group):
            sequence = chunk.sequence
            self.scheduler.computed(chunk)
            if sequence.decodes:
                # one row at a time: a product of one has its own bits
                sequence.prompt_logits = self.model.logits(hidden[row][None])

    @torch.inference_mode()
    def _copy(self, chunk: Chunk) -> None:
        """Copy what a prompt has beyond the pages that it shares."""
        sequence, source = chunk.sequence, chunk.source
        assert source is not None
        if source.prompt_logits is None:
            raise RuntimeError("the request with the same prompt failed")
        if sequence.prompt_length % PAGE:
            at = sequence.prompt_length // PAGE
            self.pages.copy(source.pages[at], sequence.pages[at])
        sequence.prompt_logits = source.prompt_logits
        self.scheduler.computed(chunk)

    @torch.inference_mode()
    def _decode(self, group: list[sequences.Sequence]) -> None:
        for begin in range(0, len(group), cpu_steps.MAX_ROWS):
            part = group[begin : begin + cpu_steps.MAX_ROWS]
            tokens = torch.tensor([s.tokens[s.computed] for s in part])
            lengths = torch.tensor([s.computed for s in part])
            table = torch.zeros(len(part), max(len(s.pages) for s in part), dtype=torch.int32)
            for row, s in enumerate(part):
                table[row, : len(s.pages)] = torch.tensor(s.pages, dtype=torch.int32)
            logits = self._decoder.logits(tokens, lengths, table)
            fresh = []
            for row, s in enumerate(part):
                s.computed += 1
                if s.computed == len(s.tokens):  # else its answer is computed again
                    fresh.append(row)
            if fresh:
                rows = logits if len(fresh) == len(part) else logits[fresh]
                self._sample([part[row] for row in fresh], rows)

    def _sample(self, group: list[sequences.Sequence], logits: Tensor) -> None:
        """Draw the next token of each sequence from (B, V) logits."""
        logits = logits.float()
        alike: dict[float, list[int]] = {}  # rows by temperature, drawn together
        for row, s in enumerate(group):
            sampling = s.request.sampling
            if s.adjustments is None and s.constraint is None and not sampling.filters:
                alike.setdefault(sampling.temperature, []).append(row)
                continue
            # Row by row: torch splits sums over the vocabulary otherwise for one row than for many
            self._guarded([s], lambda s=s, row=row: self._draw([s], s.allowed(logits[row][None])))
        for rows in alike.values():
            part = [group[row] for row in rows]
            own = logits if len(rows) == len(logits) else logits[rows]
            self._guarded(part, lambda part=part, own=own: self._draw(part, own))

    def _draw(self, group: list[sequences.Sequence], logits: Tensor) -> None:
        sampling = group[0].request.sampling
        tokens = sampling.choose(logits, [s.generator for s in group]).tolist()
        for row, (s, token) in enumerate(zip(group, tokens, strict=True)):
            wants = s.request.logprobs is not None
            told = s.logprob(logits[row][None], token) if wants else None
            self._new_tokens += 1
            try:
                ended = s.add(token, told)
            except Exception as error:  # the listener's or the grammar's
                self._end(s, "error", f"{type(error).__name__}: {error}")
                continue
            if ended:
                self._gone(s, ended)

    def _end(
        self, sequence: sequences.Sequence, reason: FinishReason, error: str | None = None
    ) -> None:
        try:
            sequence.end(reason, error)
        except Exception:  # the listener's, which has nobody to tell
            pass
        self._gone(sequence, reason)

    def _gone(self, sequence: sequences.Sequence, reason: FinishReason) -> None:
        self.scheduler.remove(sequence)
        self._finished[reason] += 1

    def _run(self) -> None:
        me = threading.current_thread()
        while self._thread is me:
            if self.step():
                continue
            with self._changed:
                waits = not (self._inbox or self._calls or self._cancelled)
                if self._thread is me and waits:
                    self._changed.wait()

    def _busy(self) -> bool:
        with self._changed:
            return bool(self._inbox) or bool(self.scheduler.sequences())

    def _checked(self, request: Request) -> int:
        """The most tokens that the request may draw."""
        prompt, vocab = request.prompt, self.model.config.vocab_size
        if not prompt:
            raise InputError("prompt: wanted at least one token, got none")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = min(prompt) if min(prompt) < 0 else max(prompt)
            raise InputError(f"prompt: wanted ids in [0, {vocab}), got {bad}")
        if request.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: wanted at least 1, got {request.max_new_tokens}")
        room = min(request.max_new_tokens, self.context_limit - len(prompt))
        if room < 1:
            raise InputError(
                f"prompt: wanted fewer than the model's {self.context_limit} tokens of context,"
                f" got {len(prompt)}"
            )
        if -(-(len(prompt) + room) // PAGE) > self.pages.count:
            raise InputError(
                f"prompt, max_new_tokens: wanted at most the cache's {self.pages.count * PAGE}"
                f" tokens in all, got {len(prompt)} + {room}"
            )
        if request.stop and self.tokenizer is None:
            raise InputError("stop: wanted an engine with a tokenizer, got one without")
        checked_stops(request.stop)
        return room

    def _retry_after(self) -> float:
        """Seconds in which the queue should have moved, at the present rate."""
        waiting = sum(s.prompt_length + s.room for s in self._inbox[:64])
        return min(60.0, max(1.0, waiting / max(self._rate, 1.0)))


def _page_count(model: "CausalLM", dtype: torch.dtype, rows: int) -> int:
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    page = numbers * PAGE * dtype.itemsize
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0] // 2
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _CACHE_SHARE
    wanted = rows * -(-config.max_position_embeddings // PAGE)
    return max(1, min(wanted, memory // page))
