"""Run generated Python programs against tests that they can neither read nor fake.

The package imports only the standard library.

    run_code("def add(a, b): return a + b", "assert add(2, 3) == 5").passed

The program and its tests are two processes. The tests call the program's functions over a pipe:
arguments and results are plain data (JSON), so that neither process has the other's code, frames or
objects. Only the process of the tests can report that they passed.

Isolation (Linux x86-64; `fastlm.sandbox.jail`):

- Network: a network namespace without interfaces; the only sockets are local socket pairs.
- Files: the root is in memory, read-only, and has only Python's standard library. Site packages,
  the user's files and /proc are not there. The program's own /tmp has `SandboxLimits.disk` bytes.
- Processes: fork, exec, kill and ptrace are refused by seccomp, which admits some 120 system calls.
  Threads are counted by RLIMIT_NPROC within the user namespace. When the tests end, all processes
  of the process namespace end.
- Time: processor seconds (a hard RLIMIT_CPU) and wall-clock seconds. Memory: RLIMIT_AS. The output
  is limited to `SandboxLimits.output` bytes; more ends the program. The environment and stdin are
  empty.
- Root: a process of root becomes the user nobody before it enters its namespaces.
- The tests are code of a data set. They run in the same isolation, separately from the program.

What a program can still do:

- See the arguments of each call, and answer differently from call to call. Recognising the inputs
  of a benchmark is memorization, which no sandbox detects.
- Return wrong results that are not plain data. Such results stay in the program's process; the
  tests may call them, iterate over them, and ask for items, length and truth value. They equal only
  themselves.
- Attack the kernel through the system calls that are admitted, or observe its neighbours through
  timing and shared caches. The sandbox is not a virtual machine: do not run programs here that
  could contain an exploit.
- Use its seconds, memory and disk in full. The machine needs `workers` times these limits.

What tests cannot do: pass their own functions or objects to the program, see an argument changed in
place, catch exception types that the program defines. The program can import the standard library
except ssl, sqlite3, libraries of ctypes and others that need more of the system.

If the machine lacks a feature (user namespaces in most containers, mount_setattr before Linux
5.12), a SandboxError names it. ``isolated=False`` uses only seccomp and limits: no network,
processes, threads, signals or files opened for writing. The program can then read every file that
the user may read, answers included.

Rejected: tests in the program's process (it can read them, replace ``print``, ``assert`` and
``__eq__``, and end with status 0); a container (it needs a daemon and an image); patched Python
functions as in HumanEval's own runner (any ``ctypes`` call bypasses them).
"""

import json
import os
import platform
import queue
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
GRACE = 30.0  # seconds that a worker may take in addition to a program's limit
SIZES = struct.Struct("<QQ")


class SandboxError(ValueError):
    """Raised for invalid limits, or a machine that lacks a feature of the isolation."""


@dataclass(frozen=True)
class SandboxLimits:
    """The limits of one program.

    seconds: seconds of processor time.
    wall: wall-clock seconds, for programs that sleep, and for shared machines.
    memory: bytes of address space; Python itself takes 20 MB.
    disk: bytes in /tmp.
    output: bytes on stdout and stderr together.
    threads: number of threads in addition to the first.
    """

    seconds: int = 10
    wall: float = 60.0
    memory: int = 2**29
    disk: int = 2**24
    output: int = 2**16
    threads: int = 16

    def __post_init__(self) -> None:
        minimum = {"wall": 0.1, "memory": 2**26, "disk": 2**12, "threads": 0}
        for name, value in vars(self).items():
            kind = (int, float) if name == "wall" else int
            if (
                isinstance(value, bool)
                or not isinstance(value, kind)
                or value < minimum.get(name, 1)
            ):
                number_kind = "a number" if name == "wall" else "a whole number"
                raise SandboxError(
                    f"{name}: expected {number_kind}, {minimum.get(name, 1)} or more, got {value!r}"
                )


@dataclass(frozen=True)
class Case:
    """A program and its tests.

    setup: code that runs before the tests, in their process, such as the helpers of a prompt. The
        program has these helpers only if the caller copies them into it.
    names: the program's functions that the tests call. They replace functions of ``setup`` and
        built-ins, for a task such as ``sum``. Other undefined names in the tests are the program's
        too, and need not be listed.
    """

    program: str
    tests: str
    setup: str = ""
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of a case: whether the tests passed, and if not, the reason.

    reason: passed; wrong (an assertion failed); error (an exception); ended (the program ended or
        stopped answering before its tests ended); crashed (a signal ended it); time (processor
        seconds), wall, memory, output: the limit that was exceeded; tests (they are invalid).
    detail: one line with details.
    output: the program's output, up to the limit.
    """

    passed: bool
    reason: str
    detail: str = ""
    output: str = field(default="", repr=False)


DEFAULT_LIMITS = SandboxLimits()


def run_code(
    program: str,
    tests: str,
    *,
    setup: str = "",
    names: Sequence[str] = (),
    limits: SandboxLimits = DEFAULT_LIMITS,
    isolated: bool = True,
) -> Outcome:
    """Run one program against its tests; see `Case`. `run_all` is faster for several programs: it
    starts a worker (0.07 s) only once.

    SandboxError: this machine lacks a feature of the isolation.
    """
    return run_all([Case(program, tests, setup, names)], limits=limits, isolated=isolated)[0]


def run_all(
    cases: Iterable[Case],
    *,
    workers: int | None = None,
    limits: SandboxLimits = DEFAULT_LIMITS,
    isolated: bool = True,
    on_outcome: Callable[[Outcome], Any] = lambda outcome: None,
) -> list[Outcome]:
    """Run the cases, ``workers`` at a time (default: CPUs), and return the outcomes in order.

    ``on_outcome`` is called with each outcome, in order. SandboxError: as for `run_code`.
    """
    cases = list(cases)
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    if count < 1:
        raise SandboxError(f"workers: expected 1 or more, got {count}")
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    started: list[_Worker] = []

    def run(case: Case) -> Outcome:
        worker = idle.get()
        try:
            return worker.run(case)
        finally:
            idle.put(worker)

    outcomes = []
    try:
        for _ in range(min(count, len(cases))):
            started.append(_Worker(limits, isolated))
            idle.put(started[-1])
        with ThreadPoolExecutor(max(1, len(started))) as pool:
            try:
                for outcome in pool.map(run, cases):
                    outcomes.append(outcome)
                    on_outcome(outcome)
            except BaseException:
                for worker in started:
                    worker.stop()  # do not wait for running cases
                raise
    finally:
        for worker in started:
            worker.close()
    return outcomes


def check_machine(*, isolated: bool = True) -> None:
    """Raise SandboxError if this machine lacks a feature of the isolation."""
    _Worker(DEFAULT_LIMITS, isolated).close()


class _Worker:
    """A process of `fastlm.sandbox.worker`, which is restarted if it is lost."""

    def __init__(self, limits: SandboxLimits, isolated: bool) -> None:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            machine = f"{sys.platform} {platform.machine()}"
            raise SandboxError(f"sandbox: expected Linux on x86-64, got {machine}")
        self.limits, self.isolated = limits, isolated
        self.stopped = False
        self.start()

    def start(self) -> None:
        library = os.path.dirname(os.path.realpath(os.__file__))
        # no site packages, no bytecode written; sets have the same order in every run
        flags = ["-s", "-S", "-P", "-B", "-X", "utf8"]
        mode = "isolated" if self.isolated else "limits"
        self.process = subprocess.Popen(
            [sys.executable, *flags, str(WORKER), library, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the caller, who ends it
        )
        ready = self.line(GRACE)
        missing = "a worker that starts" if ready is None else ready.get("missing")
        if missing:
            self.close()
            other = "; isolated=False runs programs with only limits" if self.isolated else ""
            raise SandboxError(f"sandbox: this machine lacks {missing}{other}")

    def run(self, case: Case) -> Outcome:
        request = {"program": case.program, **asdict(self.limits)}
        tests = {"setup": case.setup, "tests": case.tests, "names": list(case.names)}
        parts = [json.dumps(part).encode() for part in (request, tests)]
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(SIZES.pack(*map(len, parts)) + b"".join(parts))
            self.process.stdin.flush()
            answer = self.line(self.limits.wall + GRACE)
        except OSError:
            answer = None
        if answer is not None:
            return Outcome(answer["reason"] == "passed", **answer)
        self.close()
        if not self.stopped:
            self.start()
        return Outcome(False, "crashed", "the worker was lost")

    def line(self, seconds: float) -> dict[str, Any] | None:
        """Return the worker's next line; None if it ended or timed out."""
        assert self.process.stdout is not None
        stdout = self.process.stdout
        if not select.select([stdout], [], [], seconds)[0]:
            return None
        line = stdout.readline()  # the keeper writes full lines
        return json.loads(line) if line.endswith(b"\n") else None

    def kill(self) -> None:
        """Kill the worker and all of its processes."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def stop(self) -> None:
        self.stopped = True
        self.kill()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except OSError:  # a case was being sent
                continue
