"""An engine that computes each request alone and slowly, with the contract of
`fastlm.serve.engine.Engine`: what the server's tests need while nothing else is under test.
"""

import threading
import time
from collections import Counter
from concurrent.futures import Future

import torch

from fastlm.decode.generation import _Text
from fastlm.decode.sampling import make_generators, penalise
from fastlm.errors import InputError
from fastlm.serve.requests import EngineStats, Piece, QueueFull, TokenLogprob


class _Row:
    def __init__(self, engine, request, listener):
        self.request, self.listener = request, listener
        self.ids, self.new = list(request.prompt), []
        self.text = _Text(engine.tokenizer, list(request.stop))
        (self.generator,) = make_generators(request.seed, 1)
        self.state = None
        self.until = None if request.deadline is None else time.monotonic() + request.deadline
        ends = engine.tokenizer.stop_ids | engine.model.config.stop_ids
        self.ends = request.stop_ids | (frozenset() if request.ignore_eos else ends)


class Double:
    """`pause`: seconds that each step takes longer, for tests that need time."""

    def __init__(self, model, tokenizer, *, max_rows=8, max_waiting=16, pause=0.0):
        self.model, self.tokenizer = model, tokenizer
        self.context_limit, self.max_rows = model.context_limit, max_rows
        self.max_waiting, self.pause = max_waiting, pause
        self.lock, self.wake = threading.RLock(), threading.Event()
        self.rows, self.calls, self.next, self.closing, self.thread = {}, [], 0, None, None
        self.finished, self.steps, self.new_tokens, self.prompt_tokens = Counter(), 0, 0, 0

    def submit(self, request, listener):
        if not request.prompt or len(request.prompt) >= self.context_limit:
            raise InputError(f"prompt: wanted 1 to {self.context_limit - 1} tokens")
        with self.lock:
            if self.closing is not None:
                raise InputError("engine: is closed")
            if len(self.rows) >= self.max_rows + self.max_waiting:
                raise QueueFull(len(self.rows) - self.max_rows, 2.5)
            self.next += 1
            self.rows[self.next] = _Row(self, request, listener)
            id = self.next
        self.wake.set()
        return id

    def cancel(self, id):
        with self.lock:
            if id in self.rows:
                self._end(id, [], "", [], "cancelled")

    def call(self, function):
        future = Future()
        with self.lock:
            self.calls.append((function, future))
        self.wake.set()
        return future

    def start(self):
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while self.closing is None or self.rows:
            self.wake.clear()
            if not self.step():
                self.wake.wait(0.05)
            if self.closing is not None and time.monotonic() > self.closing:
                for id in list(self.rows):
                    self.cancel(id)

    def close(self, *, drain=0.0):
        with self.lock:
            if self.closing is None or drain == 0:
                self.closing = time.monotonic() + drain
        self.wake.set()
        if self.thread is not None:
            self.thread.join()

    def stats(self):
        running = min(len(self.rows), self.max_rows)
        return EngineStats(
            running, len(self.rows) - running, 64, running, 0, self.steps, self.prompt_tokens, 0,
            self.new_tokens, 0, dict(self.finished),
        )  # fmt: skip

    @torch.inference_mode()
    def step(self):
        with self.lock:
            calls, self.calls = self.calls, []
        for function, future in calls:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
        with self.lock:
            work = list(self.rows.items())[: self.max_rows]
        for id, row in work:
            try:
                self._advance(id, row)
            except Exception as error:
                with self.lock:
                    if id in self.rows:
                        self._end(id, [], "", [], "error", f"{type(error).__name__}")
        if work:
            time.sleep(self.pause)
            self.steps += 1
        return bool(work or calls)

    def _advance(self, id, row):
        request, sampling = row.request, row.request.sampling
        logits = self.model(torch.tensor([row.ids])).logits[:, -1].float()
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, row.ids] = True
        logits = penalise(logits, seen, sampling.repetition_penalty)
        for token, count in Counter(row.new).items():
            logits[0, token] -= sampling.presence_penalty + sampling.frequency_penalty * count
        for token, bias in sampling.logit_bias:
            logits[0, token] += bias
        if request.constraint is not None:
            row.state = row.state or request.constraint()
            logits = logits.masked_fill(~row.state.mask(), float("-inf"))
        token = int(sampling.choose(logits, [row.generator]))
        logprobs = []
        if request.logprobs is not None:
            logp = torch.log_softmax(logits[0] / (sampling.temperature or 1.0), -1)
            best = logp.topk(request.logprobs) if request.logprobs else None
            top = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist()))
            logprobs = [TokenLogprob(token, float(logp[token]), top)]
        row.ids.append(token)
        row.new.append(token)
        self.new_tokens += 1
        reason, text = None, ""
        if token in row.ends:
            reason = "stop"
        else:
            if row.state is not None:
                row.state.accept(token)
            text = row.text.push(token)
            if row.text.stopped:
                reason = "stop"
            elif len(row.new) >= request.max_new_tokens or len(row.ids) >= self.context_limit:
                reason = "length"
            elif row.until is not None and time.monotonic() > row.until:
                reason = "deadline"
        with self.lock:
            if id not in self.rows:
                return
            if reason is None:
                row.listener(Piece([token], text, logprobs))
            else:
                rest = "" if row.text.stopped else row.text.flush()
                self._end(id, [token], text + rest, logprobs, reason)

    def _end(self, id, tokens, text, logprobs, reason, error=None):
        row = self.rows.pop(id)
        self.finished[reason] += 1
        self.prompt_tokens += len(row.request.prompt)
        row.listener(
            Piece(tokens, text, logprobs, reason, error, prompt_tokens=len(row.request.prompt))
        )


class Scripted(Double):
    """Answers every request with `text`, a few characters at a time."""

    text = ""

    def _advance(self, id, row):
        at = 7 * len(row.new)
        row.new.append(0)
        part = self.text[at : at + 7]
        with self.lock:
            if id not in self.rows:
                return
            if at + 7 < len(self.text):
                row.listener(Piece([0], part, []))
            else:
                self._end(id, [0], part, [], "stop")
