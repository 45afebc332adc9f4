"""Run commands and measure what they and their child processes use."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FASTLM = (sys.executable, "-m", "fastlm")
ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.2
MAX_SECONDS = 3 * 3600


class CommandError(RuntimeError):
    """A measured command failed."""


@dataclass(frozen=True)
class Usage:
    """What a command used.

    Attributes:
        cpu_seconds: user and system time of the process and of all children it waited for.
        memory: the largest sum of the proportional set sizes of its process group, in bytes; 0 if
            it was not sampled.
        load: of the machine, the mean over a minute, when it ended.
    """

    cpu_seconds: float
    wall_seconds: float
    memory: int
    load: float
    output: str


def environment() -> dict[str, str]:
    """Return an environment of one thread and no network for models."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def run_command(
    command: Sequence[object],
    *,
    variables: Mapping[str, str] | None = None,
    sample_memory: bool = False,
) -> Usage:
    """Run a command in a session of its own. CommandError: it failed, with the end of its output.

    Standard error is part of the output, before it.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=errors, cwd=ROOT,
            env=environment() | dict(variables or {}), start_new_session=True,
        )  # fmt: skip
        sampler = _Sampler(process.pid)
        if sample_memory:
            sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            sampler.stop()
        process.returncode = code = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (errors, output):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    if code:
        raise CommandError(f"{' '.join(map(str, command))}: exit code {code}: {texts[0][-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    wall = time.monotonic() - start
    return Usage(cpu, wall, sampler.largest, os.getloadavg()[0], "".join(texts))


class _Sampler(threading.Thread):
    """Samples the memory of a process and its children."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.largest = 0
        self._pid, self._ended = pid, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            total = sum(map(proportional_size, session_processes(self._pid)))
            self.largest = max(self.largest, total)

    def stop(self) -> None:
        self._ended.set()


def session_processes(session: int) -> list[int]:
    """Return the processes of a session that are no zombies."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                pids.append(int(folder.name))
    return pids


def proportional_size(pid: int) -> int:
    """Return the proportional set size of a process in bytes: shared pages count once in a sum."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    return sum(sizes) * 1024
