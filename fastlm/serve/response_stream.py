"""Requests that run in an engine, seen from the event loop."""

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

RETRY_SECONDS = 5.0  # when a client may ask again whose share of the queue is used up


class ClientQuota:
    """How many answers of each client have not begun; ``most``: of one client, None: any number.
    For the event loop alone.
    """

    def __init__(self, most: int | None):
        self.most = most
        self.waiting: Counter[str] = Counter()

    def acquire(self, client: str, count: int) -> None:
        """Count ``count`` more. QueueFull: more than the client's share."""
        have = self.waiting[client]
        if self.most is not None and have + count > self.most:
            raise QueueFull(have, RETRY_SECONDS)
        self.waiting[client] += count

    def release(self, client: str, count: int = 1) -> None:
        """Count ``count`` fewer."""
        self.waiting[client] -= count
        if not self.waiting[client]:
            del self.waiting[client]


@dataclass
class RequestTimings:
    """Seconds of a request since it was submitted; None: not yet, or never."""

    queue: float | None = None  # until it is computed
    first: float | None = None  # until its first token
    last: float = 0.0  # until its last token
    whole: float | None = None


class ResponseStream:
    """The pieces of several requests of one client, as (index, piece), in the order in which they
    arrive.

    All are submitted at once or none is: what `Engine.submit` and `ClientQuota.acquire` raise is
    raised here. `close` cancels what still runs. The engine's thread never waits for the client:
    pieces queue, at most as many as an answer has tokens. ``times``: of each request.
    """

    def __init__(
        self, engine: "Engine", requests: Sequence[Request], metrics: "Metrics", quota: ClientQuota
    ):
        self.engine, self.metrics, self.count = engine, metrics, len(requests)
        self.times = [RequestTimings() for _ in requests]
        self._quota, self._client = quota, requests[0].client
        self._loop, self._began = asyncio.get_running_loop(), time.perf_counter()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._ids: dict[int, int] = {}
        quota.acquire(self._client, len(requests))
        self._waiting = set(range(len(requests)))
        try:
            for index, request in enumerate(requests):
                self._ids[index] = engine.submit(request, partial(self._listen, index))
        except BaseException:
            self.close()
            raise

    def _listen(self, index: int, piece: Piece) -> None:
        """Pass a piece on from the engine's thread."""
        now = time.perf_counter()  # a slow client's delays are not the engine's
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._take, index, piece, now - self._began)

    def _take(self, index: int, piece: Piece, seconds: float) -> None:
        if index in self._waiting:
            self._waiting.discard(index)
            self._quota.release(self._client)
        times, new = self.times[index], len(piece.tokens)
        if new and times.first is None:
            times.first = seconds
            self.metrics.first_token.observe(seconds)
        elif new:
            for _ in range(new):
                self.metrics.next_token.observe((seconds - times.last) / new)
        if new:
            times.last = seconds
        if piece.finish_reason is not None:
            times.queue, times.whole = piece.queue_seconds, seconds
        if piece.queue_seconds is not None:
            self.metrics.queue_seconds.observe(piece.queue_seconds)
        self._queue.put_nowait((index, piece))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._ids:
            index, piece = await self._queue.get()
            if piece.finish_reason is not None:
                del self._ids[index]
            yield index, piece

    def close(self, *, gone: bool = False) -> None:
        """Cancel the requests that have not ended; ``gone``: because their client is."""
        if gone:
            self.metrics.cancelled.inc(len(self._ids))
        for id in self._ids.values():
            self.engine.cancel(id)
        self._ids = {}
        self._quota.release(self._client, len(self._waiting))
        self._waiting = set()
