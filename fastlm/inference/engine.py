"""An engine that continues many prompts at once, each with its own options, on pages of keys and
values (`fastlm.inference.block_manager`), one step after the other (`fastlm.inference.scheduler`).

Prompts are computed by the model's modules, or as rows of the decode step, like answers
(`fastlm.model.model_runner.ModelRunner.prefers_prompt_rows`).

A request's tokens and log-probabilities do not depend on what else the engine runs, on the CPU and
where the model's runner has no reason against: rows of a decode step and the modules'
products of a prompt's pages have the same bits in any company.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.inference import sequence as sequences
from fastlm.inference.block_manager import BLOCK_SIZE, BlockManager, ChunkCache, block_count
from fastlm.inference.calls import Call, Calls
from fastlm.inference.decode_batch import DecodeBatch, DecodeRow
from fastlm.inference.draft_model import DraftModelProposer, draft_page_bytes
from fastlm.inference.requests import (
    Closed,
    Completion,
    ConstraintError,
    EngineStats,
    FinishReason,
    Listener,
    Piece,
    QueueFull,
    Request,
    batch_requests,
    room_of,
)
from fastlm.inference.sampler import NextToken, Sampler
from fastlm.inference.sampling import Sampling
from fastlm.inference.scheduler import Chunk, Scheduler
from fastlm.inference.sequence import Collected
from fastlm.inference.speculative import DraftProposer, PromptLookup

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.model_runner import ModelRunner
    from fastlm.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
# (L, V) logits, and the rows of each answer: what follows its last token and each guess
AnswerLogits = tuple[Tensor, dict[sequences.Sequence, list[int]]]
MASK_THREADS = 2  # that compute masks of grammars: one that is slow leaves one to the others
# Seconds of a step that wait for masks: most are ready by the time that logits are, or soon after
MASK_PATIENCE = 0.005


class Engine:
    """Continue prompts with `model`.

    Args:
        tokenizer: makes text of tokens; without one, answers have no text and no stop strings.
            Ids that only a padded model has are not drawn.
        num_blocks: of `BLOCK_SIZE` tokens in the cache; by default as many as `max_num_seqs` likely
            answers need (`fastlm.inference.block_manager.block_count`). On the CPU, memory is taken
            at first use.
        max_num_batched_tokens: a step computes so many tokens of answers, guesses and prompts, and
            of prompts in any case a quarter of it, or half as many as answers; where modules
            compute these, up to the end of a page. More is faster for prompts; fewer keep the
            pauses in running answers short. By default 256; where prompts are rows of the step 12,
            32 with guesses or while more than eight prompts are not done, and 64 while no answer
            runs.
        max_num_seqs: requests that run at the same time.
        max_queue_size: requests that may wait; beyond it, `submit` raises `QueueFull`.
        max_model_len: tokens of the longest prompt with its answer; by default the model's. Where
            rotary frequencies depend on the length of the context (`dynamic`, `longrope`), those of
            this length serve all requests, as in vLLM. Short answers want
            a max_model_len of their own regime (longrope: up to the original context).
        kv_cache_dtype: of keys and values: float32, bfloat16, float16 or int8 (with a scale per
            token and key head). By default the model's, float16 where its activations are rounded
            to 8 bits.
        enable_prefix_caching: share the pages of prompts that begin with the same tokens.
        batch_invariant: a request's result has the same bits in any company. Without it, the
            modules compute all prompts of a step in one product.
        prompt_rows: prompts are rows of the decode step. By default where that was measured to be
            as fast as through the modules.
        num_speculative_tokens: a step guesses up to so many next tokens of an answer and computes
            them, too. A guess is kept if it equals the token that is drawn, so the answer has the
            same bits. Without a draft model they come from the prompt
            (`fastlm.inference.speculative.PromptLookup`), which pays where answers repeat it.
        draft_model: a smaller model with the same tokens, which guesses
            (`fastlm.inference.draft_model`); by default 4 tokens. It gets as many pages as the
            model.
        turns: held during each step of `start`'s thread, by engines that share the processors
            (`fastlm.inference.fair_lock.FairLock`).
        memory_share: so many engines share the memory that `num_blocks` are taken of by default.

    `submit`, `cancel`, `call`, `update` and `stats` are for any thread. Steps run in one thread:
    that of `start`, or that of the caller of `step` and `generate`. Weights may change while
    nothing runs, or in `update`, which waits for that.

    Raises InputError: options out of range, prompt_rows, num_speculative_tokens, a draft_model or a
    kv_cache_dtype other than the model's where its steps go through its modules; a draft model with
    another vocabulary, or whose own steps do.
    """

    def __init__(
        self,
        model: "CausalLM",
        tokenizer: "Tokenizer | None" = None,
        *,
        num_blocks: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int = 64,
        max_queue_size: int = 1024,
        max_model_len: int | None = None,
        kv_cache_dtype: torch.dtype | None = None,
        enable_prefix_caching: bool = True,
        batch_invariant: bool = True,
        prompt_rows: bool | None = None,
        num_speculative_tokens: int | None = None,
        draft_model: "CausalLM | None" = None,
        turns: AbstractContextManager[Any] | None = None,
        memory_share: int = 1,
    ):
        for name, value in (
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_num_seqs", max_num_seqs),
            ("num_blocks", num_blocks),
            ("max_queue_size", max_queue_size),
        ):
            if value is not None and value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
        if max_model_len is not None and not 2 <= max_model_len <= model.context_limit:
            raise InputError(
                f"max_model_len: expected 2 to the model's {model.context_limit}, got "
                f"{max_model_len}"
            )
        least = 0 if draft_model is None else 1
        num_speculative_tokens = (
            4 * least if num_speculative_tokens is None else num_speculative_tokens
        )
        if num_speculative_tokens < least:
            with_model = " with a draft model" if least else ""
            raise InputError(
                f"num_speculative_tokens: expected at least {least}{with_model},"
                f" got {num_speculative_tokens}"
            )
        if kv_cache_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.int8):
            raise InputError(
                f"kv_cache_dtype: expected float32, bfloat16, float16 or int8, got {kv_cache_dtype}"
            )
        self.model, self.tokenizer, self.kv_cache_dtype = model, tokenizer, kv_cache_dtype
        vocab = model.config.vocab_size
        self.vocab = vocab if tokenizer is None else min(vocab, tokenizer.vocab_size)
        self.max_num_seqs, self.max_queue_size = max_num_seqs, max_queue_size
        self._turns = turns or nullcontext()
        self.batch_invariant, self.prompt_rows = batch_invariant, prompt_rows
        self.max_num_batched_tokens = max_num_batched_tokens
        self.context_limit = max_model_len or model.designed_limit
        self._ends = model.config.stop_ids | (tokenizer.stop_ids if tokenizer else frozenset())
        self._runner: ModelRunner | None = None
        runner = self._runner = model.runner()
        for name, value, wanted in (
            ("kv_cache_dtype", kv_cache_dtype, (None, model.dtype)),
            ("prompt_rows", prompt_rows, (None, False)),
            ("draft_model", draft_model and draft_model.config.model_type, (None,)),
            ("num_speculative_tokens", num_speculative_tokens, (0,)),
        ):  # fmt: skip
            if runner.fallback_reason is not None and value not in wanted:
                raise InputError(
                    f"{name}: expected {' or '.join(map(str, wanted))} for a model whose steps go"
                    f" through its modules ({runner.fallback_reason}), got {value}"
                )
        beside = 0 if draft_model is None else draft_page_bytes(draft_model, model)
        count = num_blocks or block_count(
            model.config, max_num_seqs, dtype=self._cache_dtype(runner), device=model.device,
            context=self.context_limit, beside=beside, share=memory_share,
        )  # fmt: skip
        self.pages = self._make_pages(count, runner)
        self.scheduler = Scheduler(
            self.pages, max_num_seqs=max_num_seqs, enable_prefix_caching=enable_prefix_caching
        )
        self._batch, self._sampler = self._make_batch(runner), Sampler()
        self._proposer: DraftProposer = PromptLookup(num_speculative_tokens)
        if draft_model is not None:
            self._proposer = DraftModelProposer(draft_model, count, num_speculative_tokens)
        self.scheduler.freed = self._proposer.forget
        self._changed = threading.Condition()  # guards what follows
        self._ids = itertools.count(1)
        self._alive: set[int] = set()  # ids of requests that have not ended
        self._inbox: list[sequences.Sequence] = []
        self._calls, self._updates = Calls(), Calls()
        self._cancelled: set[int] = set()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._steps = self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self._finished: Counter[str] = Counter()
        self._rate = 0.0  # tokens per second, of late
        self._mask_threads = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="fastlm-masks")
        self._patience = 0.0  # seconds for which this step may still wait for masks

    # any thread

    def submit(self, request: Request, listener: Listener) -> int:
        """Queue a request; return its id. `listener` is called in the engine's thread with each
        `Piece`; the last has a finish_reason. An error that it raises cancels the request.

        Raises InputError: a prompt without tokens or room for an answer, ids out of range, a
        request that no page is left for even alone. QueueFull: see `max_queue_size`. Closed.
        """
        return self._submit(request, listener, self.max_queue_size)

    def _submit(self, request: Request, listener: Listener, max_queue_size: int | None) -> int:
        room = room_of(
            request, vocab=self.model.config.vocab_size, context_limit=self.context_limit,
            cached=self.pages.count * BLOCK_SIZE, has_tokenizer=self.tokenizer is not None,
        )  # fmt: skip
        sequence = sequences.Sequence(
            0, request, listener, tokenizer=self.tokenizer, room=room,
            ends=request.stop_ids | (frozenset() if request.ignore_eos else self._ends),
            vocab=self.vocab, device=self.model.device, threads=self._mask_threads,
        )  # fmt: skip
        with self._changed:
            self._check_open()
            waiting = len(self._inbox) + self.scheduler.waiting_count
            if max_queue_size is not None and waiting >= max_queue_size:
                raise QueueFull(waiting, self._retry_after())
            sequence.id = next(self._ids)
            self._alive.add(sequence.id)
            self._inbox.append(sequence)
            self._changed.notify_all()
        return sequence.id

    def _check_open(self) -> None:
        if self._closed:
            raise Closed

    def cancel(self, id: int) -> None:
        """End a request after the step that runs; nothing happens if it has ended."""
        with self._changed:
            if id in self._alive:
                self._cancelled.add(id)
                self._changed.notify_all()

    def call(self, function: Callable[[], T], client: str = "") -> "Future[T]":
        """Run `function` in the engine's thread: embeddings, say. One such call runs between two
        steps, so that answers go on; calls wait in one queue per client, and the queues take turns.

        Raises Closed; QueueFull: as many calls wait as requests may.
        """
        return self._queue_call(self._calls, function, client)

    def update(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function`, which changes weights, as soon as the requests that run now have ended.
        Waiting ones begin after it, and cached prompts are forgotten. A request that was preempted
        before continues its answer with the new weights.

        Raises Closed, QueueFull.
        """
        return self._queue_call(self._updates, function, "")

    def _queue_call(self, calls: Calls, function: Callable[[], Any], client: str) -> "Future[Any]":
        call = Call(function)
        with self._changed:
            self._check_open()
            if len(calls) >= self.max_queue_size:
                raise QueueFull(len(calls), 1.0)
            calls.add(call, client)
            self._changed.notify_all()
        return call.future

    def stats(self) -> EngineStats:
        """Return counters and what the engine holds; while a step runs, of its middle."""
        scheduler, pages = self.scheduler, self.pages
        used = pages.count - pages.available
        with self._changed:
            waiting = len(self._inbox)
        return EngineStats(
            len(scheduler.running), waiting + scheduler.waiting_count, pages.count,
            pages.page_bytes, used, pages.idle, self._steps, self._prompt_tokens,
            self._cached_tokens, self._new_tokens, scheduler.preemptions, dict(self._finished),
            self._drafted_tokens, self._accepted_tokens, self._proposer.failures,
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Request | str | Sequence[int]],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 256,
        seed: int | None = None,
        on_piece: Callable[[int, Piece], Any] | None = None,
        on_completion: Callable[[Completion], Any] | None = None,
    ) -> list[Completion]:
        """Answer all prompts, in their order; here, or through the thread that `start` began.

        Args:
            prompts: requests; or texts or lists of token ids, for which the next three say how to
                continue them: prompt i draws with ``seed + i``.
            on_piece: called with the index of a prompt and what is new of its answer; a true result
                ends the answer ("cancelled").
            on_completion: called with each completion as it ends.
        """
        requests = self._requests(prompts, max_new_tokens, sampling or Sampling(), seed)
        done, failures = threading.Event(), []
        answers = [Collected() for _ in requests]
        left = itertools.count(len(requests) - 1, -1)
        ids: list[int] = []

        def listen(index: int, answer: Collected) -> Listener:
            def take(piece: Piece) -> None:
                answer(piece)
                try:
                    if on_piece is not None and not failures and on_piece(index, piece):
                        self.cancel(ids[index])
                    if on_completion is not None and not failures and answer.completion is not None:
                        on_completion(answer.completion)
                except Exception as error:
                    failures.append(error)
                    done.set()
                if answer.completion is not None and next(left) == 0:
                    done.set()

            return take

        thread = self._thread
        try:
            with self._changed:  # so that all are in `ids` before the first piece comes
                for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
                    ids.append(self._submit(request, listen(i, answer), None))
            while not done.is_set() and requests:
                if thread is not None:
                    done.wait()
                elif not self.step():
                    break
            if failures:
                raise failures[0]
        except BaseException:
            for id in ids:
                self.cancel(id)
            if thread is None:
                self._take_in()
            raise
        completions = [answer.completion for answer in answers if answer.completion is not None]
        assert len(completions) == len(requests)
        return completions

    def _requests(
        self,
        prompts: Sequence[Request | str | Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
    ) -> list[Request]:
        requests = [prompt for prompt in prompts if isinstance(prompt, Request)]
        if len(requests) == len(prompts):
            return requests
        ids: list[Sequence[int]] = []
        for prompt in prompts:
            if isinstance(prompt, Request):
                raise InputError("prompts: expected requests alone or none, got both")
            if not isinstance(prompt, str):
                ids.append(prompt)
            elif self.tokenizer is not None:
                ids.append(self.tokenizer.encode(prompt))
            else:
                raise InputError("prompts: expected ids, as the engine has no tokenizer, got a str")
        return batch_requests(ids, max_new_tokens, sampling, seed=seed)

    def start(self) -> None:
        """Step in a thread of its own until `close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fastlm-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Take no more requests, and end those that there are as cancelled."""
        with self._changed:
            self._closed = True
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        for calls in (self._calls, self._updates):
            while (call := calls.take()) is not None:
                call.future.cancel()
        self._take_in()
        for sequence in self.scheduler.sequences():
            self._end(sequence, "cancelled")
        self._mask_threads.shutdown(wait=False, cancel_futures=True)

    # the engine's thread

    def step(self) -> bool:
        """Compute one step. Whether there was anything to do."""
        busy = self._take_in()
        self.scheduler.begin()
        if not self.scheduler.running:
            busy |= self._update()
            if not self.scheduler.waiting:
                return busy
            self._prepare()
        began, before = time.monotonic(), self._prompt_tokens + self._new_tokens
        self._draw_held()
        decodes = self.scheduler.decodes()
        most = self.max_num_batched_tokens or self._budget(len(decodes))
        share = max(most // 4, len(decodes) // 2, 1)  # of prompts
        budget = max(most - len(decodes), share)
        self._proposer.propose(self.scheduler.running, budget - share if self._rowwise else 0)
        answers = [Chunk(s, s.computed, s.computed + 1 + len(s.draft)) for s in decodes]
        budget -= sum(len(s.draft) for s in decodes)
        prompts: list[Chunk] = []
        for chunk in self.scheduler.chunks(budget, admits=not self._updates):
            if chunk is not None:
                prompts.append(chunk)
                continue
            self._compute(answers, prompts)
            answers, prompts = [], []
        self._compute(answers, prompts)
        if not decodes and self._prompt_tokens + self._new_tokens == before:
            # all that runs waits for masks: no hurry, but for a new request
            waits = [s.masks.next for s in self._held() if s.masks is not None]
            wait_for(waits, timeout=0.01, return_when=FIRST_COMPLETED)
        self._steps += 1
        count = self._prompt_tokens + self._new_tokens - before
        self._rate += 0.1 * (count / max(time.monotonic() - began, 1e-6) - self._rate)
        return True

    def _draw_held(self) -> None:
        """Draw what follows the answers whose masks have come."""
        self._patience = MASK_PATIENCE
        for s in self._held():
            if s.held is not None and s.masks is not None and s.masks.is_ready(0):
                logits, s.held = s.held, None
                self._sample(logits[None], [(s, 0)])

    def _held(self) -> list[sequences.Sequence]:
        return [s for s in self.scheduler.running if s.held is not None]

    def _has_mask(self, sequence: sequences.Sequence) -> bool:
        """Whether the next token can be drawn, at once or within this step's patience."""
        if sequence.masks is None:
            return True
        began = time.monotonic()
        ready = sequence.masks.is_ready(self._patience)
        self._patience = max(0.0, self._patience - (time.monotonic() - began))
        return ready

    def _budget(self, answers: int) -> int:
        """The tokens of a step. Where prompts are rows of it, each costs answers its own time: few,
        for short pauses, unless tokens are guessed, or so many prompts wait for their end that
        throughput is what serves them."""
        if not self._uses_prompt_rows:
            return 256
        if not answers:
            return 64
        behind = self.scheduler.waiting_count + len(self.scheduler.running) - answers
        return 12 if behind <= 8 and not self._proposer.most else 32

    def _take_in(self) -> bool:
        """Take what other threads asked for, and end what is cancelled or late. Whether there was
        anything to take."""
        with self._changed:
            inbox, self._inbox = self._inbox, []
            call = self._calls.take()
            cancelled, self._cancelled = self._cancelled, set()
        for sequence in inbox:
            self.scheduler.add(sequence)
            if sequence.masks is not None:
                sequence.masks.begin()
        for sequence in self.scheduler.sequences():
            if sequence.id in cancelled:
                self._end(sequence, "cancelled")
            elif sequence.late:
                self._end(sequence, "deadline")
        if call is not None:
            call.run()
        return bool(inbox or call)

    def _update(self) -> bool:
        busy = False
        while True:
            with self._changed:
                call = self._updates.take()
            if call is None:
                return busy
            call.run()
            self._runner, busy = None, True

    def _prepare(self) -> None:
        """Before the first sequence runs: follow the model, which may have changed."""
        model = self.model
        self._proposer.prepare()
        if self._runner is not None and self._runner.is_current():
            return
        runner = self._runner = model.runner()
        dtype = self._cache_dtype(runner)
        if dtype != self.pages.data.dtype or model.device != self.pages.data.device:
            self.pages = self.scheduler.pages = self._make_pages(self.pages.count, runner)
        self.pages.forget()
        self._batch = self._make_batch(runner)

    def _cache_dtype(self, runner: "ModelRunner") -> torch.dtype:
        # the modules' attention wants keys of its own dtype
        wanted = self.kv_cache_dtype if runner.fallback_reason is None else None
        return wanted or runner.cache_dtype

    def _make_pages(self, count: int, runner: "ModelRunner") -> BlockManager:
        model = self.model
        return BlockManager(
            model.config, count, dtype=self._cache_dtype(runner), device=model.device,
            rope_length=self.context_limit if model.model.depends_on_length else 0,
        )  # fmt: skip

    def _make_batch(self, runner: "ModelRunner") -> DecodeBatch:
        rows = self.prompt_rows
        self._rowwise = runner.fallback_reason is None
        self._uses_prompt_rows = self._rowwise and (
            runner.prefers_prompt_rows if rows is None else rows
        )
        self.scheduler.by_pages = self.batch_invariant and not self._uses_prompt_rows
        self.scheduler.answers_too = self._uses_prompt_rows
        return DecodeBatch(runner.decode_runner(self.pages))

    def _guarded(self, group: list[sequences.Sequence], compute: Callable[[], None]) -> None:
        """Compute something for a group of sequences; if that fails, they end, not the engine."""
        try:
            compute()
        except ConstraintError as error:
            for sequence in group:
                self._end(sequence, "refused", str(error))
        except Exception as error:
            for sequence in group:
                if sequence.pages:
                    self._end(sequence, "error", f"{type(error).__name__}: {error}")

    def _compute(self, answers: list[Chunk], prompts: list[Chunk]) -> None:
        """Compute chunks and draw what follows them: prompts, then copies of them, then answers."""
        computed = [c for c in prompts if c.source is None]
        answered: AnswerLogits | None = None
        if self._uses_prompt_rows:
            answered = self._through_rows([*answers, *computed])
        else:
            self._through_modules(computed)
        for chunk in prompts:
            if chunk.source is None or not chunk.sequence.pages:
                continue
            if chunk.source.pages and chunk.source.decodes:
                self._guarded([chunk.sequence], lambda chunk=chunk: self._copy(chunk))
            else:  # it failed, for a reason that may be its own
                self.scheduler.postpone(chunk.sequence)
        # not before the copies: an answer of one token gives its pages back
        last = [c.sequence for c in prompts if c.end == c.sequence.prompt_length]
        begun = [s for s in last if s.pages and s.decodes]
        if fresh := [s for s in begun if len(s.tokens) == s.prompt_length]:  # not computed again
            self._cached_tokens += sum(s.cached for s in fresh)
            rows = [s.prompt_logits for s in fresh if s.prompt_logits is not None]
            self._sample(torch.cat(rows), list(zip(fresh, itertools.count())))
        if answered is None:
            answered = self._through_rows(answers)
        self._continue(answered)

    def _continue(self, answered: AnswerLogits) -> None:
        """Draw what follows answers. Where that is what was guessed, the next logits are those
        after it."""
        logits, rows = answered
        going = [s for s in rows if s.pages]  # else an error has ended it
        for i in itertools.count():
            if not going:
                return
            self._sample(logits, [(s, rows[s][i]) for s in going])
            drawn = [s for s in going if s.held is None]
            right = [s for s in drawn if len(rows[s]) > i + 1 and s.tokens[-1] == s.draft[i]]
            self._accepted_tokens += len(right)
            going = [s for s in right if s.pages]
            for s in going:
                self.scheduler.computed(Chunk(s, s.computed, s.computed + 1))

    def _through_modules(self, chunks: list[Chunk]) -> None:
        """Compute chunks of prompts: full pages of all sequences packed, then what is left of each
        prompt."""
        if self.batch_invariant:
            packed = [c for c in chunks if c.end % BLOCK_SIZE == 0]
            groups = [packed, *([c] for c in chunks if c.end % BLOCK_SIZE)]
        else:
            groups = [chunks]
        for group in groups:
            if group := [c for c in group if c.sequence.pages]:  # no error so far
                self._guarded([c.sequence for c in group], lambda group=group: self._fill(group))

    def _through_rows(self, chunks: list[Chunk]) -> AnswerLogits:
        """Compute tokens as rows of decode steps. Return the logits after answers and after each
        guess. If that fails, each chunk is computed alone."""
        if not (chunks := [c for c in chunks if c.sequence.pages]):
            return torch.empty(0, self.vocab), {}
        try:
            return self._rows(chunks)
        except Exception:
            parts: list[Tensor] = [torch.empty(0, self.model.config.vocab_size)]
            rows: dict[sequences.Sequence, list[int]] = {}

            def compute(chunk: Chunk) -> None:
                logits, own = self._rows([chunk])
                before = sum(map(len, parts))
                rows.update((s, [row + before for row in of]) for s, of in own.items())
                parts.append(logits)

            for chunk in chunks:
                self._guarded([chunk.sequence], lambda chunk=chunk: compute(chunk))
            return torch.cat([part.to(parts[-1]) for part in parts]), rows

    @torch.inference_mode()
    def _fill(self, group: list[Chunk]) -> None:
        ids = [token for c in group for token in c.sequence.tokens[c.start : c.end]]
        cache = ChunkCache(
            self.pages, [c.sequence.pages for c in group],
            [c.start for c in group], [c.end for c in group],
        )  # fmt: skip
        every = any(c.sequence.scores_prompt for c in group)
        tensor = torch.tensor(ids, device=self.model.device)
        hidden = self.model.chunk_hidden(tensor, cache, every)
        self._prompt_tokens += len(ids)
        if every:
            ends = list(itertools.accumulate(c.end - c.start for c in group))
            for chunk, end in zip(group, ends, strict=True):
                self._score(chunk, hidden[end - (chunk.end - chunk.start) : end])
            hidden = hidden[[end - 1 for end in ends]]
        for row, chunk in enumerate(group):
            sequence = chunk.sequence
            self.scheduler.computed(chunk)
            if sequence.decodes:
                # one row at a time: a product of one has its own bits
                sequence.prompt_logits = self.model.logits(hidden[row][None])

    def _score(self, chunk: Chunk, hidden: Tensor) -> None:
        """Tell a sequence what follows the tokens of a chunk, of which the head multiplies
        ``hidden``, a page at a time: products of so many rows have the same bits in any company."""
        if chunk.sequence.scores_prompt:
            rows = (row for page in hidden.split(BLOCK_SIZE) for row in self.model.logits(page))
            for i, row in enumerate(rows, chunk.start):
                chunk.sequence.score(i, row)

    @torch.inference_mode()
    def _copy(self, chunk: Chunk) -> None:
        """Copy what a prompt has beyond the pages that it shares."""
        sequence, source = chunk.sequence, chunk.source
        assert source is not None and source.prompt_logits is not None
        if sequence.prompt_length % BLOCK_SIZE:
            at = sequence.prompt_length // BLOCK_SIZE
            self.pages.copy(source.pages[at], sequence.pages[at])
        sequence.prompt_logits = source.prompt_logits
        self.scheduler.computed(chunk)

    def _rows(self, chunks: list[Chunk]) -> AnswerLogits:
        tokens = [(c.sequence, i) for c in chunks for i in range(c.start, c.end)]
        # not where an answer is computed again
        wanted = [
            i + 1 == s.prompt_length or i + 1 >= len(s.tokens)
            or (s.scores_prompt and i + 1 < s.prompt_length)
            for s, i in tokens
        ]  # fmt: skip
        rows = [
            DecodeRow(s.token(i), i, s.pages, w) for (s, i), w in zip(tokens, wanted, strict=True)
        ]
        logits = self._batch.logits(rows)
        answered: dict[sequences.Sequence, list[int]] = {}
        for row, (s, i) in enumerate(itertools.compress(tokens, wanted)):
            if i + 1 < s.prompt_length:
                s.score(i, logits[row])
            elif i + 1 == s.prompt_length:
                s.prompt_logits = logits[row].clone()[None]  # without the memory of the others
            else:
                answered.setdefault(s, []).append(row)
        for chunk in chunks:
            sequence = chunk.sequence
            if not sequence.decodes:
                self._prompt_tokens += chunk.end - chunk.start
            # the guesses are not known to be right yet
            known = Chunk(sequence, chunk.start, min(chunk.end, len(sequence.tokens)))
            self._drafted_tokens += chunk.end - known.end
            self.scheduler.computed(known)
        return logits, answered

    def _sample(self, logits: Tensor, rows: Sequence[tuple[sequences.Sequence, int]]) -> None:
        """Draw the next token of each sequence from its row of (L, V) logits."""
        group: list[sequences.Sequence] = []
        chosen_from: list[NextToken] = []

        def take(s: sequences.Sequence, row: int) -> None:
            mask = None if s.masks is None else s.masks.mask()
            chosen_from.append(
                NextToken(
                    row, s.options, s.generator, mask, not s.must_go_on, s.request.logprobs
                )
            )  # fmt: skip
            group.append(s)

        for s, row in rows:
            if self._has_mask(s):
                self._guarded([s], lambda s=s, row=row: take(s, row))
            else:
                s.held = logits[row].clone()
        self._guarded(group, lambda: self._draw(group, logits, chosen_from))

    def _draw(self, group: list[sequences.Sequence], logits: Tensor, rows: list[NextToken]) -> None:
        choices = self._sampler.choose(logits, rows)
        for s, (token, logprob) in zip(group, choices, strict=True):
            if token < 0:
                self._end(s, "error", "logits are not finite")
                continue
            self._new_tokens += 1
            try:
                ended = s.add(token, logprob)
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
        with self._changed:
            self._alive.discard(sequence.id)

    def _run(self) -> None:
        me = threading.current_thread()
        while self._thread is me:
            try:
                with self._turns:
                    busy = self.step()
            except BaseException as error:  # out of memory, say: ends the requests, not the thread
                self._runner, busy = None, True
                for sequence in self.scheduler.sequences():
                    self._end(sequence, "error", f"{type(error).__name__}: {error}")
            if busy:
                continue
            with self._changed:
                asked = self._inbox or self._calls or self._updates or self._cancelled
                if self._thread is me and not asked:
                    self._changed.wait()

    def _retry_after(self) -> float:
        """Seconds in which the present queue should be done, at the present rate."""
        waiting = [*self._inbox, *self.scheduler.queued()]
        tokens = sum(s.prompt_length + s.room for s in waiting)
        return min(60.0, max(1.0, tokens / max(self._rate, 1.0)))
