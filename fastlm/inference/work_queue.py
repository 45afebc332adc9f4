"""Functions that an engine's thread runs for other threads."""

from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class WorkItem:
    """A function to run. ``future`` gets what the function returns or raises."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.future: Future[Any] = Future()

    def run(self) -> None:
        """Run the function, unless the future was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except Exception as error:
            self.future.set_exception(error)


class WorkQueue:
    """Items that wait, in one queue per client; the queues take turns. The engine's lock guards
    them."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[WorkItem]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, item: WorkItem, client: str) -> None:
        """Append an item to the queue of ``client``."""
        self._queues.setdefault(client, deque()).append(item)

    def pop(self) -> WorkItem | None:
        """Remove and return the first item of the client that is next, or None."""
        if not self._queues:
            return None
        client, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._queues[client] = queue  # behind the other clients
        return item
