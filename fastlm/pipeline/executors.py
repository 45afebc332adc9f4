"""Call a function for each unit of work, in this process, in a pool of processes, or on Ray.

An executor yields ``(number, error)`` as the calls end, in any order; the results are on the disk
(`fastlm.pipeline.units`). An exception of one call does not end the others. A worker process that
is killed costs its unit one of `ATTEMPTS`, and nothing else. Workers end with their parent.

Rejected: datatrove's executors. On Ray, ``run()`` returns normally after a task failed, and a
killed process hangs it; the same work as plain tasks took a third of the time.
"""

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from fastlm.errors import InputError
from fastlm.files import reason


class BuildError(InputError):
    """A build that cannot go on now; what is finished stays, and the next run continues."""


class WorkerKilledError(RuntimeError):
    """The processes that did a unit were killed, `ATTEMPTS` times."""


Call = Callable[[int], Any]
Outcome = tuple[int, BaseException | None]
Outcomes = Generator[Outcome, None, None]
EXECUTORS = ("pool", "ray")
ATTEMPTS = 3  # of a unit: workers are killed by the system for want of memory, nodes disappear
# A unit takes seconds. These limits end one that hangs, with and without use of the processor
MAX_CPU_SECONDS = 3600
MAX_SECONDS = 6 * 3600


def run_calls(
    call: Call, numbers: Sequence[int], *, executor: str = "pool", workers: int = 1
) -> Outcomes:
    """Yield (number, error or None) for ``call(number)`` of each of the numbers, as they end.

    executor: "pool", ``workers`` processes of this machine (one: this process), or "ray", the
    cluster of the address in ``RAY_ADDRESS`` ("auto" by default), where ``workers`` has no meaning.
    """
    if executor == "ray":
        return _run_on_ray(call, numbers)
    if executor != "pool":
        raise InputError(f"executor: expected one of {', '.join(EXECUTORS)}, got {executor!r}")
    if workers == 1 or len(numbers) == 1:
        return _run_here(call, numbers)
    return _run_in_pool(call, numbers, workers)


def _run_here(call: Call, numbers: Iterable[int]) -> Outcomes:
    for number in numbers:
        try:
            call(number)
        except Exception as error:
            yield number, error
        else:
            yield number, None


def _start_worker() -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent and ends when the parent ends."""
    # a terminal sends SIGINT to all processes, and a worker would print a traceback
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see _interrupt_later
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _call_bounded(call: Call, number: int) -> None:
    """Call under a limit of CPU time; the system kills the worker that exceeds it."""
    with suppress(ImportError, ValueError, OSError):  # no such limits on this system
        import resource

        used = sum(os.times()[:2])
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + MAX_CPU_SECONDS, hard))
    try:
        call(number)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # it would break the pool, and nobody would see it
            raise RuntimeError(f"{type(error).__name__}: {reason(error)}") from None
        raise


class _SharedPool:
    """The worker processes of a `shared_pool`, started at the first use."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.workers = 0

    def open(self, workers: int) -> ProcessPoolExecutor:
        if self.pool is None or self.workers != workers:
            self.close()
            self.workers = workers
            self.pool = ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_start_worker
            )
        return self.pool

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None


_shared: ContextVar[_SharedPool | None] = ContextVar("shared_pool", default=None)


@contextmanager
def shared_pool() -> Iterator[None]:
    """Context: calls in pools use the same workers, which import their modules only once."""
    pool = _SharedPool()
    token = _shared.set(pool)
    try:
        yield
    finally:
        _shared.reset(token)
        pool.close()


def _run_in_pool(call: Call, numbers: Sequence[int], workers: int) -> Outcomes:
    """Run in spawned processes: a fork of a process with OpenMP threads (torch) may hang.

    At most ``workers`` units are under way. When a worker is killed, its pool is broken: all units
    under way have an attempt less, and a new pool does them again.
    """
    attempts: Counter[int] = Counter()
    queue = list(reversed(numbers))
    shared = _shared.get()
    workers_of_call = shared or _SharedPool()
    while queue:
        pool = workers_of_call.open(workers)
        running: dict[Future, int] = {}
        try:
            while queue or running:
                while queue and len(running) < workers:
                    # a broken pool refuses it: it stays in the queue
                    with _interrupt_later():
                        running[pool.submit(_call_bounded, call, queue[-1])] = queue[-1]
                    queue.pop()
                done, _ = wait(running, timeout=MAX_SECONDS, return_when=FIRST_COMPLETED)
                if not done:
                    _kill(pool)
                    raise BuildError(
                        f"units {sorted(running.values())}: expected one to end within "
                        f"{MAX_SECONDS:,} s, none did"
                    )
                for future in done:
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise error
                    yield running.pop(future), error
        except BrokenProcessPool:
            workers_of_call.close()
            for number in running.values():
                attempts[number] += 1
            lost = [n for n in running.values() if attempts[n] >= ATTEMPTS]
            for number in lost:
                yield number, WorkerKilledError(f"its worker was killed {ATTEMPTS} times")
            queue += sorted(set(running.values()) - {*lost}, reverse=True)
        except BaseException:
            _kill(pool)
            workers_of_call.close()
            raise
    if shared is None:
        workers_of_call.close()


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Context: Ctrl-C takes effect at its end, and processes that start in it do not see it: they
    would print tracebacks while they import, and a pool that is half started cannot be closed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # starting it would end the mask
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if interrupts:
        raise KeyboardInterrupt


def _kill(pool: ProcessPoolExecutor) -> None:
    """Kill the workers: what they had begun is done again."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()


def _run_on_ray(call: Call, numbers: Sequence[int]) -> Outcomes:
    """Submit each call as a Ray task of one CPU, and again if its worker or node was lost.

    Ray's own retries are off: it repeats a task that needs too much memory without end.
    """
    ray = _connect()
    from ray.exceptions import RayError, RayTaskError  # type: ignore[import-not-found]

    task = ray.remote(num_cpus=1, max_retries=0)(_call_in)
    folder, pickled = os.getcwd(), pickle.dumps(call)
    attempts: Counter[int] = Counter()
    queue, running = list(reversed(numbers)), {}
    last = time.monotonic()
    try:
        while queue or running:
            while queue and len(running) < MAX_SUBMITTED:
                number = queue.pop()
                running[task.remote(folder, pickled, number)] = number
            done, _ = ray.wait(list(running), timeout=MAX_SILENCE)
            if done:
                last = time.monotonic()
            elif not any(node["Alive"] for node in ray.nodes()):
                raise BuildError("executor: expected a Ray cluster, its nodes have disappeared")
            elif time.monotonic() - last > MAX_SECONDS:
                raise BuildError(
                    f"units {sorted(running.values())[:10]}: expected one to end within "
                    f"{MAX_SECONDS:,} s, none did"
                )
            for ref in done:
                number, error = running.pop(ref), None
                try:
                    ray.get(ref)
                except RayTaskError as failure:
                    error = failure.cause if isinstance(failure.cause, Exception) else failure
                except RayError as failure:
                    attempts[number] += 1
                    if attempts[number] < ATTEMPTS:
                        queue.append(number)
                        continue
                    error = WorkerKilledError(
                        f"its worker was killed {ATTEMPTS} times: {type(failure).__name__}"
                    )
                yield number, error
    finally:
        for ref in running:
            with suppress(Exception):
                ray.cancel(ref, force=True)


def call_on_every_node(call: Callable[[], Any], executor: str = "pool") -> None:
    """Call once on each node, as far as nodes answer within `MAX_SILENCE`. Errors are ignored."""
    with suppress(Exception):
        call()
    if executor != "ray":
        return
    with suppress(Exception):
        ray = _connect()
        from ray.util.scheduling_strategies import (  # type: ignore[import-not-found]
            NodeAffinitySchedulingStrategy,
        )

        strategies = [
            NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            for node in ray.nodes() if node["Alive"]
        ]  # fmt: skip
        task = ray.remote(num_cpus=0, max_retries=0)(_call_pickled)
        pickled = pickle.dumps(call)
        refs = [task.options(scheduling_strategy=s).remote(pickled) for s in strategies]
        ray.wait(refs, num_returns=len(refs), timeout=MAX_SILENCE)


def _call_pickled(pickled: bytes) -> None:
    pickle.loads(pickled)()


MAX_SUBMITTED = 1000  # tasks at once: Ray's cost of waiting grows with their number
MAX_SILENCE = 60  # seconds without a finished unit until the cluster is looked at
MAX_CONNECT = 10  # seconds


def _connect() -> Any:
    """Return the module ray, connected to a cluster. InputError: not installed, no cluster."""
    # of a cluster that this process would start; Ray warns of the second one
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            "executor: expected the package ray for 'ray', it is missing: pip install "
            "'fastlm[cluster]'"
        ) from None
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        host, _, port = address.rpartition("://")[2].rpartition(":")
        if host and port.isdigit():  # ray.init waits a minute for a host that does not answer
            socket.create_connection((host, int(port)), MAX_CONNECT).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        # lost workers and nodes would be printed to stdout; their units are done again or named
        sys.modules["ray._private.worker"].__dict__["_worker_logs_enabled"] = False
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"executor: expected a Ray cluster at {address!r} (start one with ray start --head),"
            f" got: {reason(error):.200}"
        ) from None
    return ray


def _call_in(folder: str, pickled: bytes, number: int) -> None:
    """Call as in the folder of the command: paths are as the user wrote them."""
    # a node without this folder shares no files with the command's: it has all on object storage
    with suppress(FileNotFoundError):
        os.chdir(folder)
    _call_bounded(pickle.loads(pickled), number)
