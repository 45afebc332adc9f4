"""Bridge between the engine's thread and the event loop: quotas, timings and pieces of requests."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fastlm.inference.requests import Piece, QueueFull, Request

if TYPE_CHECKING:
    from fastlm.inference.engine import Engine
    from fastlm.serve.metrics import Metrics

RETRY_SECONDS = 5.0  # after which a client that has used up its quota may try again


class ClientQuota:
    """Bounds the waiting answers of each client to ``max_waiting``; None: unbounded. Only the event
    loop may use it.
    """

    def __init__(self, max_waiting: int | None):
        self.max_waiting = max_waiting
        self.waiting: Counter[str] = Counter()

    def acquire(self, client: str, count: int) -> None:
        """Add ``count`` waiting answers. QueueFull: the client would exceed its quota."""
        waiting = self.waiting[client]
        if self.max_waiting is not None and waiting + count > self.max_waiting:
            raise QueueFull(waiting, RETRY_SECONDS)
        self.waiting[client] += count

    def release(self, client: str, count: int = 1) -> None:
        """Remove ``count`` waiting answers."""
        self.waiting[client] -= count
        if not self.waiting[client]:
            del self.waiting[client]


@dataclass
class RequestTimings:
    """Times of a request in seconds since it was submitted; None: not yet, or never."""

    queue_seconds: float | None = None  # until the engine begins with it
    first_token_seconds: float | None = None
    last_token_seconds: float = 0.0
    total_seconds: float | None = None


class ResponseStream:
    """Yields the pieces of one client's requests as (index, piece), in the order of their arrival.

    Either all requests are submitted or none is; the constructor raises what `Engine.submit` and
    `ClientQuota.acquire` raise. `close` cancels the requests that still run. The engine's thread
    never waits for the client: pieces are queued, at most one for each token. ``timings`` has an
    entry for each request.
    """

    def __init__(
        self, engine: "Engine", requests: Sequence[Request], metrics: "Metrics", quota: ClientQuota
    ):
        self.engine, self.metrics, self.count = engine, metrics, len(requests)
        self.timings = [RequestTimings() for _ in requests]
        self._quota, self._client = quota, requests[0].client
        self._loop, self._start = asyncio.get_running_loop(), time.perf_counter()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._ids: dict[int, int] = {}
        quota.acquire(self._client, len(requests))
        self._waiting = set(range(len(requests)))
        try:
            for index, request in enumerate(requests):
                self._ids[index] = engine.submit(request, partial(self._on_piece, index))
        except BaseException:
            self.close()
            raise

    def _on_piece(self, index: int, piece: Piece) -> None:
        """Hand a piece from the engine's thread to the event loop."""
        now = time.perf_counter()  # here, since a slow client delays the event loop's queue
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._add, index, piece, now - self._start)

    def _add(self, index: int, piece: Piece, seconds: float) -> None:
        if index in self._waiting:
            self._waiting.discard(index)
            self._quota.release(self._client)
        timings, count = self.timings[index], len(piece.tokens)
        if count and timings.first_token_seconds is None:
            timings.first_token_seconds = seconds
            self.metrics.first_token.observe(seconds)
        elif count:
            for _ in range(count):
                self.metrics.next_token.observe((seconds - timings.last_token_seconds) / count)
        if count:
            timings.last_token_seconds = seconds
        if piece.finish_reason is not None:
            timings.queue_seconds, timings.total_seconds = piece.queue_seconds, seconds
        if piece.queue_seconds is not None:
            self.metrics.queue_seconds.observe(piece.queue_seconds)
        self._queue.put_nowait((index, piece))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._ids:
            index, piece = await self._queue.get()
            if piece.finish_reason is not None:
                del self._ids[index]
            yield index, piece

    def close(self, *, disconnected: bool = False) -> None:
        """Cancel the requests that have not ended. ``disconnected``: count them as cancelled by
        their client."""
        if disconnected:
            self.metrics.cancelled.inc(len(self._ids))
        for id in self._ids.values():
            self.engine.cancel(id)
        self._ids = {}
        self._quota.release(self._client, len(self._waiting))
        self._waiting = set()
