"""The engine: it continues many prompts at once, each with its own options, with a KV cache in
blocks (`fastlm.inference.block_manager`), one step after the other (`fastlm.inference.scheduler`).

The model's modules compute prompts, or prompts are rows of the decode step, like answers
(`fastlm.model.model_runner.ModelRunner.prefers_prompt_rows`).

Results are batch-invariant on the CPU, where the decode kernel runs the model: the tokens and
log-probabilities of a request do not depend on what else the engine runs. Rows of a decode step,
and the modules' products of the blocks of a prompt, have the same bits in every batch.
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
from fastlm.inference.block_manager import (
    BLOCK_SIZE,
    BlockManager,
    PrefillKVCache,
    default_num_blocks,
)
from fastlm.inference.decode_batch import DecodeBatch, DecodeRow
from fastlm.inference.draft_model import DraftModelProposer, draft_block_bytes
from fastlm.inference.requests import (
    Completion,
    ConstraintError,
    EngineClosed,
    EngineStats,
    FinishReason,
    Listener,
    Piece,
    QueueFull,
    Request,
    batch_requests,
    max_new_tokens_for,
)
from fastlm.inference.sampler import Sampler, SamplerInput
from fastlm.inference.sampling import Sampling
from fastlm.inference.scheduler import Chunk, Scheduler
from fastlm.inference.sequence import CompletionCollector
from fastlm.inference.speculative import DraftProposer, PromptLookup
from fastlm.inference.work_queue import WorkItem, WorkQueue
from fastlm.memory import keep_freed_memory

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.model_runner import ModelRunner
    from fastlm.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
# (L, V) logits, and the rows of each answer: those after its last token and after each draft token
AnswerLogits = tuple[Tensor, dict[sequences.Sequence, list[int]]]
FREE_BYTES_LIMIT = 256 << 20  # of freed memory, for the tensors of the next step
MASK_THREADS = 2  # that compute token masks: a slow grammar leaves one thread to the others
# Seconds of a step that wait for masks: most are ready when the logits are, or soon after
MASK_PATIENCE = 0.005


class Engine:
    """Continues prompts with `model`.

    Args:
        tokenizer: turns tokens into text; without one, answers have no text and no stop strings.
            Ids that only a padded model has are not sampled.
        num_blocks: the number of blocks of the KV cache, of `BLOCK_SIZE` tokens each. The default
            fits `max_num_seqs` typical answers
            (`fastlm.inference.block_manager.default_num_blocks`). On the CPU, memory is allocated
            at first use.
        max_num_batched_tokens: a step computes up to this many tokens of answers, drafts and
            prompts. Prompts get at least a quarter of it, or half as many tokens as there are
            answers; where modules compute them, up to the end of a block. A large number is faster
            for prompts; a small one keeps the pauses in running answers short. Default: 256; 512
            while no answer runs. Where prompts are rows of the step: 12; 32 with draft tokens or
            while more than eight prompts are not done; 64 while no answer runs.
        max_num_seqs: the number of requests that run at the same time.
        max_queue_size: the number of requests that may wait; beyond it, `submit` raises
            `QueueFull`.
        max_model_len: the tokens of the longest prompt with its answer; default: the model's
            context. Where rotary frequencies depend on the length of the context (`dynamic`,
            `longrope`), those of this length serve all requests, as in vLLM. For short answers, set
            it to a length of their regime (longrope: up to the original context).
        kv_cache_dtype: the dtype of keys and values: float32, bfloat16, float16 or int8 (with a
            scale per token and key head). Default: the model's, or float16 where its activations
            are rounded to 8 bits.
        enable_prefix_caching: prompts that begin with the same tokens share blocks.
        batch_invariant: the result of a request has the same bits in every batch. Without it, the
            modules compute all prompts of a step in one product.
        prompt_rows: prompts are rows of the decode step. By default they are where that was
            measured to be as fast as the modules.
        num_speculative_tokens: a step computes up to this many draft tokens of an answer. A draft
            token is accepted if it equals the token that is sampled, so the answer has the same
            bits. Without a draft model they come from the prompt
            (`fastlm.inference.speculative.PromptLookup`), which helps where answers repeat it.
        draft_model: a smaller model with the same vocabulary that proposes draft tokens
            (`fastlm.inference.draft_model`), by default 4. Its KV cache has as many blocks as the
            model's.
        step_lock: the thread of `start` holds this lock during each step. Engines that share the
            processors share it (`fastlm.inference.fair_lock.FairLock`).
        num_engines: the number of engines that share the memory, for the default of `num_blocks`.

    Any thread may call `submit`, `cancel`, `call`, `update` and `stats`. Steps run in one thread:
    that of `start`, or that of the caller of `step` and `generate`. Weights may change while
    nothing runs, or in `update`, which waits for that.

    Raises InputError: options out of range; where the model's modules compute its steps:
    prompt_rows, num_speculative_tokens, a draft_model or a kv_cache_dtype other than the model's; a
    draft model that has another vocabulary, or that the decode kernel cannot run.
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
        step_lock: AbstractContextManager[Any] | None = None,
        num_engines: int = 1,
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
        min_tokens = 0 if draft_model is None else 1
        num_speculative_tokens = (
            4 * min_tokens if num_speculative_tokens is None else num_speculative_tokens
        )
        if num_speculative_tokens < min_tokens:
            with_model = " with a draft model" if min_tokens else ""
            raise InputError(
                f"num_speculative_tokens: expected at least {min_tokens}{with_model},"
                f" got {num_speculative_tokens}"
            )
        if kv_cache_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.int8):
            raise InputError(
                f"kv_cache_dtype: expected float32, bfloat16, float16 or int8, got {kv_cache_dtype}"
            )
        if model.device.type == "cpu":  # fresh pages were 10 % of the prompts of eight users
            keep_freed_memory(FREE_BYTES_LIMIT)
        self.model, self.tokenizer, self.kv_cache_dtype = model, tokenizer, kv_cache_dtype
        vocab = model.config.vocab_size
        self.vocab = vocab if tokenizer is None else min(vocab, tokenizer.vocab_size)
        self.max_num_seqs, self.max_queue_size = max_num_seqs, max_queue_size
        self._step_lock = step_lock or nullcontext()
        self.batch_invariant, self.prompt_rows = batch_invariant, prompt_rows
        self.max_num_batched_tokens = max_num_batched_tokens
        self.context_limit = max_model_len or model.designed_limit
        self._stop_ids = model.config.stop_ids | (tokenizer.stop_ids if tokenizer else frozenset())
        self._runner: ModelRunner | None = None
        runner = self._runner = model.runner()
        for name, value, allowed in (
            ("kv_cache_dtype", kv_cache_dtype, (None, model.dtype)),
            ("prompt_rows", prompt_rows, (None, False)),
            ("draft_model", draft_model and draft_model.config.model_type, (None,)),
            ("num_speculative_tokens", num_speculative_tokens, (0,)),
        ):  # fmt: skip
            if runner.fallback_reason is not None and value not in allowed:
                raise InputError(
                    f"{name}: expected {' or '.join(map(str, allowed))} for a model that runs"
                    f" module by module ({runner.fallback_reason}), got {value}"
                )
        draft_bytes = 0 if draft_model is None else draft_block_bytes(draft_model, model)
        count = num_blocks or default_num_blocks(
            model.config, max_num_seqs, dtype=self._cache_dtype(runner), device=model.device,
            max_model_len=self.context_limit, extra_block_bytes=draft_bytes, num_caches=num_engines,
        )  # fmt: skip
        self.block_manager = self._make_block_manager(count, runner)
        self.scheduler = Scheduler(
            self.block_manager,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=enable_prefix_caching,
        )
        self._batch, self._sampler = self._make_batch(runner), Sampler()
        self._proposer: DraftProposer = PromptLookup(num_speculative_tokens)
        if draft_model is not None:
            self._proposer = DraftModelProposer(draft_model, count, num_speculative_tokens)
        self.scheduler.on_free = self._proposer.release
        self._changed = threading.Condition()  # guards what follows
        self._ids = itertools.count(1)
        self._active_ids: set[int] = set()  # of requests that have not ended
        self._inbox: list[sequences.Sequence] = []
        self._work, self._updates = WorkQueue(), WorkQueue()
        self._cancelled: set[int] = set()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._steps = self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self._finished: Counter[str] = Counter()
        self._rate = 0.0  # tokens per second, of late
        self._mask_threads = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="fastlm-masks")
        self._patience = 0.0  # seconds that this step may still wait for masks

    # any thread

    def submit(self, request: Request, listener: Listener) -> int:
        """Queue a request; return its id. `listener` is called in the engine's thread with each
        `Piece`; the last has a finish_reason. An error that it raises cancels the request.

        Raises InputError: an empty prompt, a prompt that leaves no token for an answer, ids out of
        range, a request that exceeds the cache. QueueFull: see `max_queue_size`. EngineClosed.
        """
        return self._submit(request, listener, self.max_queue_size)

    def _submit(self, request: Request, listener: Listener, max_queue_size: int | None) -> int:
        max_new_tokens = max_new_tokens_for(
            request, vocab=self.model.config.vocab_size, context_limit=self.context_limit,
            cache_tokens=self.block_manager.num_blocks * BLOCK_SIZE,
            has_tokenizer=self.tokenizer is not None,
        )  # fmt: skip
        sequence = sequences.Sequence(
            0, request, listener, tokenizer=self.tokenizer, max_new_tokens=max_new_tokens,
            stop_ids=request.stop_ids | (frozenset() if request.ignore_eos else self._stop_ids),
            vocab=self.vocab, device=self.model.device, threads=self._mask_threads,
        )  # fmt: skip
        with self._changed:
            self._check_open()
            waiting = len(self._inbox) + self.scheduler.waiting_count
            if max_queue_size is not None and waiting >= max_queue_size:
                raise QueueFull(waiting, self._retry_after())
            sequence.id = next(self._ids)
            self._active_ids.add(sequence.id)
            self._inbox.append(sequence)
            self._changed.notify_all()
        return sequence.id

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed

    def cancel(self, id: int) -> None:
        """End a request after the step that runs; nothing happens if it has ended."""
        with self._changed:
            if id in self._active_ids:
                self._cancelled.add(id)
                self._changed.notify_all()

    def call(self, function: Callable[[], T], client: str = "") -> "Future[T]":
        """Run `function` in the engine's thread, for example to compute embeddings. One call runs
        between two steps, so answers continue. Calls wait in one queue per client, and the queues
        take turns.

        Raises EngineClosed; QueueFull: `max_queue_size` calls wait already.
        """
        return self._enqueue(self._work, function, client)

    def update(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function`, which changes weights, as soon as the requests that run now have ended.
        Waiting requests begin after it, and the prefix cache is emptied. A request that was
        preempted before continues its answer with the new weights.

        Raises EngineClosed, QueueFull.
        """
        return self._enqueue(self._updates, function, "")

    def _enqueue(self, queue: WorkQueue, function: Callable[[], Any], client: str) -> "Future[Any]":
        item = WorkItem(function)
        with self._changed:
            self._check_open()
            if len(queue) >= self.max_queue_size:
                raise QueueFull(len(queue), 1.0)
            queue.add(item, client)
            self._changed.notify_all()
        return item.future

    def stats(self) -> EngineStats:
        """Return counters and the state of the engine, even in the middle of a step."""
        scheduler, manager = self.scheduler, self.block_manager
        used = manager.num_blocks - manager.num_free
        with self._changed:
            waiting = len(self._inbox)
        return EngineStats(
            len(scheduler.running), waiting + scheduler.waiting_count, manager.num_blocks,
            manager.block_bytes, used, manager.num_cached, self._steps, self._prompt_tokens,
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
        """Return a completion of each prompt, in their order. Steps run here, or in the thread that
        `start` began.

        Args:
            prompts: requests; or texts or lists of token ids, for which the next three arguments
                count: prompt i draws with ``seed + i``.
            on_piece: called with the index of a prompt and each piece of its answer; a true result
                ends the answer ("cancelled").
            on_completion: called with each completion as it ends.
        """
        requests = self._requests(prompts, max_new_tokens, sampling or Sampling(), seed)
        done, failures = threading.Event(), []
        answers = [CompletionCollector() for _ in requests]
        remaining = itertools.count(len(requests) - 1, -1)
        ids: list[int] = []

        def listen(index: int, answer: CompletionCollector) -> Listener:
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
                if answer.completion is not None and next(remaining) == 0:
                    done.set()

            return take

        thread = self._thread
        try:
            with self._changed:  # all are in `ids` before the first piece comes
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
                self._receive()
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
        """Run steps in a thread of its own until `close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fastlm-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Refuse further requests, and cancel those that run or wait."""
        with self._changed:
            self._closed = True
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        for queue in (self._work, self._updates):
            while (item := queue.pop()) is not None:
                item.future.cancel()
        self._receive()
        for sequence in self.scheduler.sequences():
            self._end(sequence, "cancelled")
        self._mask_threads.shutdown(wait=False, cancel_futures=True)

    # the engine's thread

    def step(self) -> bool:
        """Compute one step. Return whether there was anything to do."""
        busy = self._receive()
        self.scheduler.begin_step()
        if not self.scheduler.running:
            busy |= self._update()
            if not self.scheduler.waiting:
                return busy
            self._follow_model()
        start, previous_tokens = time.monotonic(), self._prompt_tokens + self._new_tokens
        self._sample_paused()
        decoding = self.scheduler.schedule_decodes()
        max_tokens = self.max_num_batched_tokens or self._default_budget(
            len(decoding) + len(self._paused())
        )
        min_prompt_tokens = max(max_tokens // 4, len(decoding) // 2, 1)
        budget = max(max_tokens - len(decoding), min_prompt_tokens)
        draft_budget = budget - min_prompt_tokens if self._has_row_kernel else 0
        self._proposer.propose(self.scheduler.running, draft_budget)
        answers = [Chunk(s, s.num_computed, s.num_computed + 1 + len(s.draft)) for s in decoding]
        budget -= sum(len(s.draft) for s in decoding)
        prompts: list[Chunk] = []
        for chunk in self.scheduler.schedule_prefills(budget, admits=not self._updates):
            if chunk is not None:
                prompts.append(chunk)
                continue
            self._compute(answers, prompts)
            answers, prompts = [], []
        self._compute(answers, prompts)
        if not decoding and self._prompt_tokens + self._new_tokens == previous_tokens:
            # all running sequences wait for masks; a new request may come at any time
            masks = [s.masks.next for s in self._paused() if s.masks is not None]
            wait_for(masks, timeout=0.01, return_when=FIRST_COMPLETED)
        self._steps += 1
        count = self._prompt_tokens + self._new_tokens - previous_tokens
        self._rate += 0.1 * (count / max(time.monotonic() - start, 1e-6) - self._rate)
        return True

    def _sample_paused(self) -> None:
        """Sample the next tokens of paused answers that have their masks now."""
        self._patience = MASK_PATIENCE
        for s in self._paused():
            if s.pending_logits is not None and s.masks is not None and s.masks.is_ready(0):
                logits, s.pending_logits = s.pending_logits, None
                self._sample(logits[None], [(s, 0)])

    def _paused(self) -> list[sequences.Sequence]:
        """Return the sequences with logits that wait for a mask."""
        return [s for s in self.scheduler.running if s.pending_logits is not None]

    def _wait_for_mask(self, sequence: sequences.Sequence) -> bool:
        """Wait for a mask, within this step's patience. Return whether the next token can be
        sampled."""
        if sequence.masks is None:
            return True
        start = time.monotonic()
        is_ready = sequence.masks.is_ready(self._patience)
        self._patience = max(0.0, self._patience - (time.monotonic() - start))
        return is_ready

    def _default_budget(self, answers: int) -> int:
        """Return the tokens of a step. Where prompts are rows of it, each row delays the answers.
        So there are few, for short pauses, unless there are draft tokens, or many unfinished
        prompts that throughput matters more."""
        if not self._uses_prompt_rows:
            return 256 if answers else 512  # a prompt alone: 1.1 times as fast
        if not answers:
            return 64
        num_prompts = self.scheduler.waiting_count + len(self.scheduler.running) - answers
        return 12 if num_prompts <= 8 and not self._proposer.num_speculative_tokens else 32

    def _receive(self) -> bool:
        """Receive the requests of other threads, run one call, and end what is cancelled or late.
        Return whether there was a request or a call."""
        with self._changed:
            inbox, self._inbox = self._inbox, []
            item = self._work.pop()
            cancelled, self._cancelled = self._cancelled, set()
        for sequence in inbox:
            self.scheduler.add(sequence)
            if sequence.masks is not None:
                sequence.masks.start()
        for sequence in self.scheduler.sequences():
            if sequence.id in cancelled:
                self._end(sequence, "cancelled")
            elif sequence.is_late:
                self._end(sequence, "deadline")
        if item is not None:
            item.run()
        return bool(inbox or item)

    def _update(self) -> bool:
        """Run the updates that wait. Return whether there were any."""
        busy = False
        while True:
            with self._changed:
                item = self._updates.pop()
            if item is None:
                return busy
            item.run()
            self._runner, busy = None, True

    def _follow_model(self) -> None:
        """Follow the model, which may have changed, before the first sequence runs."""
        model = self.model
        self._proposer.prepare()
        if self._runner is not None and self._runner.is_current():
            return
        runner = self._runner = model.runner()
        dtype = self._cache_dtype(runner)
        if dtype != self.block_manager.data.dtype or model.device != self.block_manager.data.device:
            self.block_manager = self.scheduler.block_manager = self._make_block_manager(
                self.block_manager.num_blocks, runner
            )
        self.block_manager.clear_cache()
        self._batch = self._make_batch(runner)

    def _cache_dtype(self, runner: "ModelRunner") -> torch.dtype:
        # the modules' attention needs keys of its own dtype
        dtype = self.kv_cache_dtype if runner.fallback_reason is None else None
        return dtype or runner.cache_dtype

    def _make_block_manager(self, num_blocks: int, runner: "ModelRunner") -> BlockManager:
        model = self.model
        return BlockManager(
            model.config, num_blocks, dtype=self._cache_dtype(runner), device=model.device,
            rope_length=self.context_limit if model.model.depends_on_length else 0,
        )  # fmt: skip

    def _make_batch(self, runner: "ModelRunner") -> DecodeBatch:
        """Return the decode batch of a runner, and set how prompts are computed."""
        option = self.prompt_rows
        self._has_row_kernel = runner.fallback_reason is None
        self._uses_prompt_rows = self._has_row_kernel and (
            runner.prefers_prompt_rows if option is None else option
        )
        self.scheduler.aligns_chunks = self.batch_invariant and not self._uses_prompt_rows
        self.scheduler.recomputes_as_prompt = self._uses_prompt_rows
        return DecodeBatch(runner.decode_runner(self.block_manager))

    def _run_safely(self, group: list[sequences.Sequence], compute: Callable[[], None]) -> None:
        """Call ``compute`` for a group of sequences. If it fails, they end, and not the engine."""
        try:
            compute()
        except ConstraintError as error:
            for sequence in group:
                self._end(sequence, "refused", str(error))
        except Exception as error:
            for sequence in group:
                if sequence.block_table:
                    self._end(sequence, "error", f"{type(error).__name__}: {error}")

    def _compute(self, answers: list[Chunk], prompts: list[Chunk]) -> None:
        """Compute chunks and sample the tokens after them: prompts, then copies of prompts, then
        answers."""
        new_prompts = [c for c in prompts if c.source is None]
        answer_logits: AnswerLogits | None = None
        if self._uses_prompt_rows:
            answer_logits = self._compute_rows([*answers, *new_prompts])
        else:
            self._compute_with_modules(new_prompts)
        for chunk in prompts:
            if chunk.source is None or not chunk.sequence.block_table:
                continue
            if chunk.source.block_table and chunk.source.is_decoding:
                self._run_safely([chunk.sequence], lambda chunk=chunk: self._copy_prompt(chunk))
            else:  # the source failed, perhaps for a reason of its own
                self.scheduler.requeue(chunk.sequence)
        # not before the copies: an answer of one token releases its blocks
        completed = [c.sequence for c in prompts if c.end == c.sequence.prompt_length]
        decoding = [s for s in completed if s.block_table and s.is_decoding]
        if new := [s for s in decoding if len(s.tokens) == s.prompt_length]:  # not recomputed
            self._cached_tokens += sum(s.num_cached for s in new)
            rows = [s.prompt_logits for s in new if s.prompt_logits is not None]
            self._sample(torch.cat(rows), list(zip(new, itertools.count())))
        if answer_logits is None:
            answer_logits = self._compute_rows(answers)
        self._continue_answers(answer_logits)

    def _continue_answers(self, answer_logits: AnswerLogits) -> None:
        """Sample the next tokens of answers. Where the token is the draft token, the logits after
        that one come next."""
        logits, rows = answer_logits
        active = [s for s in rows if s.block_table]  # others were ended by an error
        for i in itertools.count():
            if not active:
                return
            self._sample(logits, [(s, rows[s][i]) for s in active])
            sampled = [s for s in active if s.pending_logits is None]
            accepted = [s for s in sampled if len(rows[s]) > i + 1 and s.tokens[-1] == s.draft[i]]
            self._accepted_tokens += len(accepted)
            active = [s for s in accepted if s.block_table]
            for s in active:
                self.scheduler.mark_computed(Chunk(s, s.num_computed, s.num_computed + 1))

    def _compute_with_modules(self, chunks: list[Chunk]) -> None:
        """Compute chunks of prompts: the full blocks of all sequences packed, then the rest of each
        prompt alone."""
        if self.batch_invariant:
            packed = [c for c in chunks if c.end % BLOCK_SIZE == 0]
            groups = [packed, *([c] for c in chunks if c.end % BLOCK_SIZE)]
        else:
            groups = [chunks]
        for group in groups:
            if group := [c for c in group if c.sequence.block_table]:  # without error so far
                self._run_safely(
                    [c.sequence for c in group], lambda group=group: self._run_modules(group)
                )

    def _compute_rows(self, chunks: list[Chunk]) -> AnswerLogits:
        """Compute tokens as rows of decode steps. Return the logits after answers and after each
        draft token. If that fails, compute each chunk alone."""
        if not (chunks := [c for c in chunks if c.sequence.block_table]):
            return torch.empty(0, self.vocab), {}
        try:
            return self._run_rows(chunks)
        except Exception:
            parts: list[Tensor] = [torch.empty(0, self.model.config.vocab_size)]
            rows: dict[sequences.Sequence, list[int]] = {}

            def compute(chunk: Chunk) -> None:
                logits, chunk_rows = self._run_rows([chunk])
                offset = sum(map(len, parts))
                rows.update((s, [offset + i for i in indices]) for s, indices in chunk_rows.items())
                parts.append(logits)

            for chunk in chunks:
                self._run_safely([chunk.sequence], lambda chunk=chunk: compute(chunk))
            return torch.cat([part.to(parts[-1]) for part in parts]), rows

    @torch.inference_mode()
    def _run_modules(self, group: list[Chunk]) -> None:
        ids = [token for c in group for token in c.sequence.tokens[c.start : c.end]]
        cache = PrefillKVCache(
            self.block_manager, [c.sequence.block_table for c in group],
            [c.start for c in group], [c.end for c in group],
        )  # fmt: skip
        all_positions = any(c.sequence.needs_prompt_logprobs for c in group)
        tensor = torch.tensor(ids, device=self.model.device)
        hidden = self.model.chunk_hidden(tensor, cache, all_positions)
        self._prompt_tokens += len(ids)
        if all_positions:
            ends = list(itertools.accumulate(c.end - c.start for c in group))
            for chunk, end in zip(group, ends, strict=True):
                self._score_prompt(chunk, hidden[end - (chunk.end - chunk.start) : end])
            hidden = hidden[[end - 1 for end in ends]]
        for row, chunk in enumerate(group):
            sequence = chunk.sequence
            self.scheduler.mark_computed(chunk)
            if sequence.is_decoding:
                # one row at a time: a product of one row has other bits than one of many
                sequence.prompt_logits = self.model.logits(hidden[row][None])

    def _score_prompt(self, chunk: Chunk, hidden: Tensor) -> None:
        """Add the log-probabilities after the tokens of a chunk, whose last layer gave ``hidden``.
        The head multiplies a block at a time, so the bits are batch-invariant."""
        if chunk.sequence.needs_prompt_logprobs:
            rows = (row for block in hidden.split(BLOCK_SIZE) for row in self.model.logits(block))
            for i, row in enumerate(rows, chunk.start):
                chunk.sequence.add_prompt_logprob(i, row)

    @torch.inference_mode()
    def _copy_prompt(self, chunk: Chunk) -> None:
        """Copy the part of a prompt beyond the blocks that it shares."""
        sequence, source = chunk.sequence, chunk.source
        assert source is not None and source.prompt_logits is not None
        if sequence.prompt_length % BLOCK_SIZE:
            i = sequence.prompt_length // BLOCK_SIZE
            self.block_manager.copy_block(source.block_table[i], sequence.block_table[i])
        sequence.prompt_logits = source.prompt_logits
        self.scheduler.mark_computed(chunk)

    def _run_rows(self, chunks: list[Chunk]) -> AnswerLogits:
        tokens = [(c.sequence, i) for c in chunks for i in range(c.start, c.end)]
        # no logits for the tokens of an answer that is recomputed
        needs_logits = [
            i + 1 == s.prompt_length or i + 1 >= len(s.tokens)
            or (s.needs_prompt_logprobs and i + 1 < s.prompt_length)
            for s, i in tokens
        ]  # fmt: skip
        rows = [
            DecodeRow(s.token(i), i, s.block_table, needed)
            for (s, i), needed in zip(tokens, needs_logits, strict=True)
        ]
        logits = self._batch.logits(rows)
        answer_rows: dict[sequences.Sequence, list[int]] = {}
        for row, (s, i) in enumerate(itertools.compress(tokens, needs_logits)):
            if i + 1 < s.prompt_length:
                s.add_prompt_logprob(i, logits[row])
            elif i + 1 == s.prompt_length:
                s.prompt_logits = logits[row].clone()[None]  # without the memory of the others
            else:
                answer_rows.setdefault(s, []).append(row)
        for chunk in chunks:
            sequence = chunk.sequence
            if not sequence.is_decoding:
                self._prompt_tokens += chunk.end - chunk.start
            # without draft tokens, which are not accepted yet
            computed = Chunk(sequence, chunk.start, min(chunk.end, len(sequence.tokens)))
            self._drafted_tokens += chunk.end - computed.end
            self.scheduler.mark_computed(computed)
        return logits, answer_rows

    def _sample(self, logits: Tensor, rows: Sequence[tuple[sequences.Sequence, int]]) -> None:
        """Sample the next token of each sequence from its row of (L, V) logits."""
        group: list[sequences.Sequence] = []
        inputs: list[SamplerInput] = []

        def take(s: sequences.Sequence, row: int) -> None:
            mask = None if s.masks is None else s.masks.mask()
            inputs.append(
                SamplerInput(
                    row, s.options, s.generator, mask, not s.must_continue, s.request.logprobs
                )
            )  # fmt: skip
            group.append(s)

        for s, row in rows:
            if self._wait_for_mask(s):
                self._run_safely([s], lambda s=s, row=row: take(s, row))
            else:
                s.pending_logits = logits[row].clone()
        self._run_safely(group, lambda: self._draw(group, logits, inputs))

    def _draw(
        self, group: list[sequences.Sequence], logits: Tensor, inputs: list[SamplerInput]
    ) -> None:
        sampled = self._sampler.sample(logits, inputs)
        for s, (token, logprob) in zip(group, sampled, strict=True):
            if token < 0:
                self._end(s, "error", "logits are not finite")
                continue
            self._new_tokens += 1
            try:
                reason = s.append(token, logprob)
            except Exception as error:  # of the listener or the grammar
                self._end(s, "error", f"{type(error).__name__}: {error}")
                continue
            if reason:
                self._remove(s, reason)

    def _end(
        self, sequence: sequences.Sequence, reason: FinishReason, error: str | None = None
    ) -> None:
        try:
            sequence.finish(reason, error)
        except Exception:  # of the listener, which the engine cannot report to anyone
            pass
        self._remove(sequence, reason)

    def _remove(self, sequence: sequences.Sequence, reason: FinishReason) -> None:
        self.scheduler.remove(sequence)
        self._finished[reason] += 1
        with self._changed:
            self._active_ids.discard(sequence.id)

    def _run(self) -> None:
        thread = threading.current_thread()
        while self._thread is thread:
            try:
                with self._step_lock:
                    busy = self.step()
            except BaseException as error:  # such as out of memory: ends requests, not the thread
                self._runner, busy = None, True
                for sequence in self.scheduler.sequences():
                    self._end(sequence, "error", f"{type(error).__name__}: {error}")
            if busy:
                continue
            with self._changed:
                has_work = self._inbox or self._work or self._updates or self._cancelled
                if self._thread is thread and not has_work:
                    self._changed.wait()

    def _retry_after(self) -> float:
        """Estimate the seconds until the present queue is done, at the present rate."""
        waiting = [*self._inbox, *self.scheduler.waiting_sequences()]
        tokens = sum(s.prompt_length + s.max_new_tokens for s in waiting)
        return min(60.0, max(1.0, tokens / max(self._rate, 1.0)))
