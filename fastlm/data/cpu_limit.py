"""Stop a Python function when its thread has used too much CPU time, never wall time.

A wall-time limit makes the result depend on the load: datatrove's 1 second lost 8 of 2,726 pages on
a busy machine. Here a second thread watches the CPU clock of the first and raises an exception in
it. This works in every thread of a process and leaves the process's signals alone.

The exception arrives between two bytecodes, so one long call into C ends first. Callers bound the
size of what they pass. A call that finishes after more than the limit also counts as stopped, so
the outcome does not depend on when the watching thread runs.

Rejected: ``setitimer(ITIMER_PROF)`` (signals reach only the main thread, and the clock counts all
threads); a child process with RLIMIT_CPU (whole seconds, and a process for every page or a second
pool to guard); wall time with a retry (three times as slow, and still a limit of wall time).
"""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 0.05  # seconds between two looks at the clock
# Seconds of CPU time. Python drops an exception that arrives in a destructor, so it is raised
# again; much later, so that it does not meet the code that handles the first.
AGAIN = 0.25


class CpuLimitReached(Exception):
    """The function used more CPU time than allowed."""


# Not an Exception: parsers catch those and continue
class _Stop(BaseException):
    pass


class _Watch(threading.Thread):
    """Raise `_Stop` in the thread that creates this one when its CPU clock reaches ``deadline``
    (seconds), and again after every further AGAIN seconds, until `end` is called.
    """

    def __init__(self, deadline: float) -> None:
        super().__init__(name="cpu-limit", daemon=True)
        self.deadline = deadline
        self.target = threading.get_ident()
        self.clock = time.pthread_getcpuclockid(self.target)
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(INTERVAL):
            with self.lock:
                now = time.clock_gettime(self.clock)
                if now >= self.deadline and not self.ended.is_set():
                    _raise_in(self.target, _Stop)
                    self.deadline = now + AGAIN

    def end(self) -> None:
        """Return only when `run` can no longer raise, and drop what it raised but Python has not
        delivered.
        """
        while True:
            try:
                with self.lock:
                    self.ended.set()
                _raise_in(self.target, None)
                return
            except _Stop:
                continue


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Raise ``exception`` in a thread; None clears one that is still to be delivered."""
    value = ctypes.py_object(exception) if exception else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)


def call_with_cpu_limit(function: Callable[[], T], seconds: float) -> T:
    """Return ``function()``. CpuLimitReached: it used more than ``seconds`` of its thread's CPU
    time. What it did until then is not undone.

    Without CPU clocks of threads (macOS, Windows) it runs to its end and is judged then.
    """
    if not hasattr(time, "pthread_getcpuclockid"):
        return _timed(function, seconds)
    watch = _Watch(time.thread_time() + seconds)
    try:
        try:
            watch.start()
            return _timed(function, seconds)
        finally:
            watch.end()
    except _Stop:
        watch.end()  # again: the exception may have arrived before the first one began
        raise CpuLimitReached(f"expected at most {seconds} s of CPU time") from None


def _timed(function: Callable[[], T], seconds: float) -> T:
    begin = time.thread_time()
    value = function()
    if time.thread_time() - begin > seconds:
        raise CpuLimitReached(f"expected at most {seconds} s of CPU time")
    return value
