"""FairLock on the processors that several engines share."""

import threading
from collections import deque


class FairLock:
    """A lock that is given in the order in which it was asked for, held by an engine during each
    step: with a plain lock, the engine that ends a step begins its next one before another engine
    wakes up. Steps that ran side by side would share the cores, and wait for each other's threads.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._held:
                self._held = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until it is released by whose turn ends

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()  # and the turn stays held
            else:
                self._held = False
