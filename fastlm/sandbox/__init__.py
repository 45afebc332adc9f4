"""Run generated Python programs against tests that they can neither read nor fake.

A package of its own: it imports the standard library alone.

    run_code("def add(a, b): return a + b", "assert add(2, 3) == 5").passed

The program and its tests are two processes. The tests call the program's functions over a pipe:
arguments go there and results come back as plain data (JSON), so that neither process holds the
other's code, frames or objects. Only the process of the tests can say that they passed.

Contained (Linux x86-64; `fastlm.sandbox.jail`):

- Network: a network namespace without interfaces; no call makes a socket but a pair of its own.
- Files: the root is in memory and read-only and holds Python's standard library. Site packages, the
  user's files and /proc are not there. /tmp is the program's own, of `SandboxLimits.disk` bytes.
- Processes: fork, exec, kill and ptrace are refused by seccomp, which admits some 120 system calls.
  Threads are counted by RLIMIT_NPROC within the user namespace. When the tests end, so does all
  that runs in the process namespace.
- Time: processor seconds (a hard RLIMIT_CPU) and seconds by the clock. Memory: RLIMIT_AS. The
  output is cut off, and ends the program, at `SandboxLimits.output` bytes. The environment and
  stdin are empty.
- Root: a process of root's becomes the user nobody before it enters its namespaces.
- The tests are code of a data set and run in the same jail, apart from the program.

What a program can still do:

- See each call's arguments as the call comes, and answer differently from call to call. Recognising
  a benchmark's inputs is memorization, which no sandbox sees.
- Answer wrongly where the tests ask it for more than data. Results that are not plain data stay in
  the program's process; the tests may call them, iterate over them and ask for items, length and
  truth. They never equal anything but themselves.
- Attack the kernel through the calls that are admitted, or its neighbours through timing and shared
  caches. This is no virtual machine: do not run programs here that are worth an exploit.
- Use its seconds, memory and disk in full: `workers` times of them are needed.

What tests cannot do here: pass functions or objects of their own to the program, see an argument
changed in place, catch exception types that the program defines. The program can import the
standard library but ssl, sqlite3, ctypes' libraries and the like, which need more of the system.

A machine that refuses a part (user namespaces in most containers, mount_setattr before Linux 5.12)
is a SandboxError that names it. With ``isolated=False`` seccomp and limits stand alone: no network,
no process, no thread, no signal, no file opened for writing; but every file that the user may read
can be read, answers included.

Rejected: tests in the program's process (it can read them, replace ``print``, ``assert`` and
``__eq__``, and end with status 0); a container (it needs a daemon and an image); patched Python
functions as in HumanEval's own runner (any ``ctypes`` call goes round them).
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
GRACE = 30.0  # seconds that a worker may take beyond a program's own
SIZES = struct.Struct("<QQ")


class SandboxError(ValueError):
    """Limits that cannot be, or a machine that lacks a part of the isolation, in one line."""


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may use.

    seconds: of processor time.
    wall: seconds by the clock: for programs that sleep, and on machines that others use.
    memory: bytes of address space; Python itself takes 20 MB.
    disk: bytes in /tmp.
    output: bytes on stdout and stderr together.
    threads: beside the first.
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

    setup: code that both the tests and, by copy, the program may use: helpers of a prompt. It runs
        before the tests, in their process; the program gets what the caller writes into it.
    names: the program's functions that the tests call. They replace those of ``setup`` and of
        Python, as for a task that asks for ``sum``. Names that the tests use and neither define nor
        find in ``setup`` or in Python are the program's without being named.
    """

    program: str
    tests: str
    setup: str = ""
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """Whether the tests passed, and if not, why.

    reason: passed; wrong (an assertion failed); error (an exception); ended (the program ended or
        stopped answering before its tests did); crashed (a signal ended it); time (processor
        seconds), wall, memory, output: the limit that was reached; tests (they cannot be used).
    detail: one line on it.
    output: what the program wrote, up to the limit.
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
    """Run one program against its tests; see `Case` and the module. `run_all` shares the start of
    the worker (0.07 s) among programs.

    SandboxError: this machine lacks a part of the isolation.
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
    """Run each case and return the outcomes in order, ``workers`` at a time (default: processors).

    ``on_outcome`` is called with each outcome, in order. SandboxError: as `run_code`.
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
                    worker.stop()  # what runs now is not waited for
                raise
    finally:
        for worker in started:
            worker.close()
    return outcomes


def check_machine(*, isolated: bool = True) -> None:
    """Raise SandboxError where this machine lacks a part of the isolation."""
    _Worker(DEFAULT_LIMITS, isolated).close()


class _Worker:
    """One `fastlm.sandbox.worker`, started again where it was lost."""

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
            other = "; isolated=False runs programs with limits alone" if self.isolated else ""
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
        """The worker's next line; None where it ended or took too long."""
        assert self.process.stdout is not None
        stdout = self.process.stdout
        if not select.select([stdout], [], [], seconds)[0]:
            return None
        line = stdout.readline()  # the keeper writes lines whole
        return json.loads(line) if line.endswith(b"\n") else None

    def kill(self) -> None:
        """End the worker and all that it started."""
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
            except OSError:  # a case that was being sent
                continue
