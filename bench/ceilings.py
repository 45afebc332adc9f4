"""Measure this machine's ceilings: each multiply instruction on registers, and memory reads.

Also measure how much of the machine other processes use meanwhile. A ceiling measured while other
work runs is too low, and every share of it is too high. Ceilings are therefore measured on a quiet
machine, before and after the rows, and dropped where the two measurements differ.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastlm import backend

# dtype of the work -> instructions of its accuracy (float32 sums); "bf16": a GPU's product
INSTRUCTIONS = {
    "bf16": ("bf16", "bf16 tiles", "bf16 dot", "fp32 FMA"),
    "fp16": ("fp32 FMA",),
    "fp32": ("fp32 FMA",),
    "int8": ("int8 tiles", "int8 dot", "bf16 tiles", "bf16 dot", "fp32 FMA"),
}
MAX_DIFFERENCE = 0.1  # two measurements of one ceiling may differ by this
BUSY = 0.1  # share of the cores that other processes may use
MAX_WAIT = 30  # seconds to wait for a quiet machine
SAMPLE_SECONDS = 0.5  # over which the use of the cores is measured
ATTEMPTS = 15  # the best counts
STEPS = 400_000  # steps of 12 products each on every thread: a millisecond
TICK = os.sysconf("SC_CLK_TCK")


def fastest_instruction(limits: dict[str, float], dtype: str) -> str:
    """Return the fastest instruction of this machine for work in `dtype`."""
    return max((i for i in INSTRUCTIONS[dtype] if i in limits), key=limits.__getitem__)


def total_cpu_seconds() -> float:
    """Return the CPU seconds of all cores since the system started, including stolen time; 0 where
    the system does not report them."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / TICK


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a process and of its terminated children."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICK


class OtherProcesses:
    """Measures the share of the cores that other processes use, from the creation of the object.

    Other processes are all but this one and its `workers`.
    """

    def __init__(self, workers: Sequence[int] = ()):
        self.processes = (os.getpid(), *workers)
        self.start = time.monotonic()
        self.before = self._seconds()

    def _seconds(self) -> float:
        used = total_cpu_seconds()
        return used and used - sum(map(cpu_seconds, self.processes))

    def share(self) -> float:
        passed = (time.monotonic() - self.start) * (os.cpu_count() or 1)
        # every clock here counts in ticks, so a difference of a few ticks is not another process
        used = self._seconds() - self.before - 4 / TICK
        return min(1.0, max(0.0, used / max(passed, 1e-9)))


def ceilings() -> dict[str, float]:
    """Return FLOP/s of each instruction and bytes/s of memory reads. Empty if other processes used
    the cores in every attempt."""
    for _ in range(3):
        others = OtherProcesses()
        best = measure_ceilings()
        if others.share() <= BUSY:
            return best
    return {}


def measure_ceilings() -> dict[str, float]:
    buffer = torch.rand(64 << 20)  # 256 MiB: larger than the caches of most machines
    extension = backend.cpu_extension
    best = dict.fromkeys([*extension.peak_instructions(), "read"], 0.0)
    for _ in range(ATTEMPTS):
        for name in best:
            start = time.perf_counter()
            if name == "read":
                extension.read_all(buffer)
                done = buffer.numel() * 4
            else:
                done = extension.run_peak(name, STEPS)
            best[name] = max(best[name], done / (time.perf_counter() - start))
    return best


def cpu_seconds_by_process() -> dict[int, float]:
    """Return the CPU seconds of each process that can be read."""
    used = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            used[int(folder.name)] = cpu_seconds(int(folder.name))
        except OSError:  # it has ended
            continue
    return used


def busiest(before: dict[int, float], seconds: float) -> str:
    """Describe the three other processes that have used most CPU since `before`, with their shares
    of a core."""
    after = cpu_seconds_by_process()
    used = {p: after[p] - before[p] for p in after.keys() & before.keys() if p != os.getpid()}
    descriptions = []
    for process in sorted(used, key=used.__getitem__, reverse=True)[:3]:
        try:
            name = Path(f"/proc/{process}/comm").read_text().strip()
        except OSError:
            continue
        if used[process] > 0:
            descriptions.append(
                f"{name} (process {process}) {used[process] / seconds:.0%} of a core"
            )
    return ", ".join(descriptions)


def wait_until_quiet(busy: bool) -> None:
    """End the process if other processes keep using the machine, unless `busy` allows it."""
    if busy:
        return
    end = time.monotonic() + MAX_WAIT
    warned = False
    while True:
        before, others = cpu_seconds_by_process(), OtherProcesses()
        time.sleep(SAMPLE_SECONDS)
        share = others.share()
        if share <= BUSY:
            return
        processes = busiest(before, SAMPLE_SECONDS)
        line = f"bench: other processes have {share:.0%} of the cores ({processes})"
        if time.monotonic() > end:
            sys.exit(f"{line}: figures would be wrong (--busy measures anyway)")
        if not warned:
            print(f"{line}, waiting {MAX_WAIT} s at most", file=sys.stderr)
            warned = True


def ceilings_before(busy: bool) -> dict[str, float]:
    wait_until_quiet(busy)
    return ceilings()


def confirm_ceilings(before: dict[str, float]) -> dict[str, float]:
    """Measure the ceilings again after the rows, and return the better values of both times. Empty
    if they do not agree even when measured again."""
    for _ in range(3):
        after = ceilings()
        if not before or not after:
            return {}
        better = {name: max(before[name], after[name]) for name in before}
        difference = max(1 - min(before[name], after[name]) / better[name] for name in before)
        if difference <= MAX_DIFFERENCE:
            return better
        before = better
    return {}
