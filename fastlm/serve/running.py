"""Requests that run in an engine, seen from the event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastlm.serve.requests import EngineStats, Listener, Piece, Request

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from fastlm.serve.metrics import Metrics

T = TypeVar("T")


class Engine(Protocol):
    """What the server needs of `fastlm.serve.engine.Engine`."""

    context_limit: int

    def submit(self, request: Request, listener: Listener) -> int: ...
    def cancel(self, id: int) -> None: ...
    def call(self, function: "Callable[[], T]") -> "Future[T]": ...
    def stats(self) -> EngineStats: ...
    def start(self) -> None: ...
    def close(self, *, drain: float = 0.0) -> None: ...


class Running:
    """The pieces of several requests, as (index, piece), in the order in which they arrive.

    All are submitted at once or none is: what `Engine.submit` raises is raised here. `close`
    cancels what still runs. The engine's thread never waits for the client: pieces queue, at most
    as many as an answer has tokens.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], metrics: "Metrics"):
        self.engine, self.metrics, self.count = engine, metrics, len(requests)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}
        self._ids: dict[int, int] = {}
        try:
            for index, request in enumerate(requests):
                self._ids[index] = engine.submit(request, self._listener(index))
        except BaseException:
            self._cancel()
            raise

    def _listener(self, index: int) -> Listener:
        def listen(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return listen

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._ids:
            index, piece = await self._queue.get()
            self._measure(index, piece)
            if piece.finish_reason is not None:
                del self._ids[index]
            yield index, piece

    def _measure(self, index: int, piece: Piece) -> None:
        now, new = time.perf_counter(), len(piece.tokens)
        if new and index not in self._last:
            self.metrics.first_token.observe(now - self._began)
        elif new:
            for _ in range(new):
                self.metrics.next_token.observe((now - self._last[index]) / new)
        if new:
            self._last[index] = now

    def close(self) -> None:
        """Cancel the requests that have not ended."""
        self.metrics.cancelled.inc(len(self._ids))
        self._cancel()

    def _cancel(self) -> None:
        for id in self._ids.values():
            self.engine.cancel(id)
        self._ids = {}


async def gone(receive: Any) -> None:
    """Wait until the client has closed the connection. The request's body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
