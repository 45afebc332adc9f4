"""Functions that an engine's thread runs for other threads."""

from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Call:
    """``future`` gets what the function returns or raises."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except Exception as error:
            self.future.set_exception(error)


class Calls:
    """Calls that wait, in one queue per client; the queues take turns. The engine's lock guards
    them."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Call]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, call: Call, client: str) -> None:
        self._queues.setdefault(client, deque()).append(call)

    def take(self) -> Call | None:
        """Remove and return the first call of the client whose turn it is."""
        if not self._queues:
            return None
        client, queue = self._queues.popitem(last=False)
        call = queue.popleft()
        if queue:
            self._queues[client] = queue  # behind the other clients
        return call
