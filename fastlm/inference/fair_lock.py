"""A fair lock for the processors that several engines share."""

import threading
from collections import deque


class FairLock:
    """A lock that threads get in the order in which they requested it. An engine holds it during
    each step. With a plain lock, the engine that ends a step would begin its next one before
    another engine wakes up. Steps that run at the same time would share the cores and wait for
    each other's threads.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locked = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._locked:
                self._locked = True
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._waiting.append(ticket)
        ticket.acquire()  # blocks until the thread before this one releases it

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()  # the lock passes on and stays locked
            else:
                self._locked = False
