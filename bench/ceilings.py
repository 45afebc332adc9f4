"""What this machine can do at most: each multiply instruction on registers, and memory reads. Also
how much of the machine other processes used meanwhile.

A ceiling measured while other work runs is too low, and every share of it is too high. So the
ceilings are measured on a quiet machine, before and after the rows, and dropped where the two
measurements differ.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastlm import backend

# dtype of the work -> instructions of its accuracy (float32 sums); "bf16": a GPU's product
OF_DTYPE = {
    "bf16": ("bf16", "bf16 tiles", "bf16 dot", "fp32 FMA"),
    "fp16": ("fp32 FMA",),
    "fp32": ("fp32 FMA",),
    "int8": ("int8 tiles", "int8 dot", "bf16 tiles", "bf16 dot", "fp32 FMA"),
}
SAME = 0.1  # two measurements of one ceiling may differ by this
BUSY = 0.1  # share of the cores that other processes may use
PATIENCE = 30  # seconds to wait for a quiet machine
LOOK = 0.5  # seconds in which their use is looked at
ATTEMPTS = 15  # the best counts
STEPS = 400_000  # steps of 12 products each on every thread: a millisecond
TICK = os.sysconf("SC_CLK_TCK")


def highest(limits: dict[str, float], dtype: str) -> str:
    """The fastest instruction of this machine for work in `dtype`."""
    return max((i for i in OF_DTYPE[dtype] if i in limits), key=limits.__getitem__)


def seconds_in_use() -> float:
    """CPU seconds of all cores since the system started, stolen time included; 0 where the system
    does not report them."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / TICK


def seconds_of(process: int) -> float:
    """CPU seconds of a process and of its terminated children."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICK


class Others:
    """The share of the cores used by processes other than this one and its `workers`, counted from
    the creation of the object.
    """

    def __init__(self, workers: Sequence[int] = ()):
        self.processes = (os.getpid(), *workers)
        self.start = time.monotonic()
        self.before = self._seconds()

    def _seconds(self) -> float:
        used = seconds_in_use()
        return used and used - sum(map(seconds_of, self.processes))

    def share(self) -> float:
        passed = (time.monotonic() - self.start) * (os.cpu_count() or 1)
        # every clock here counts in ticks, so a difference of a few ticks is not another process
        theirs = self._seconds() - self.before - 4 / TICK
        return min(1.0, max(0.0, theirs / max(passed, 1e-9)))


def ceilings() -> dict[str, float]:
    """FLOP/s of each instruction and bytes/s of memory reads. Empty if other processes used the
    cores each time.
    """
    for _ in range(3):
        others = Others()
        best = best_of_several()
        if others.share() <= BUSY:
            return best
    return {}


def best_of_several() -> dict[str, float]:
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


def used_by_process() -> dict[int, float]:
    """CPU seconds of each process that can be read."""
    used = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            used[int(folder.name)] = seconds_of(int(folder.name))
        except OSError:  # it has ended
            continue
    return used


def busiest(before: dict[int, float], seconds: float) -> str:
    """The three other processes that have used most CPU since `before`, with their shares of a
    core."""
    after = used_by_process()
    used = {p: after[p] - before[p] for p in after.keys() & before.keys() if p != os.getpid()}
    named = []
    for process in sorted(used, key=used.__getitem__, reverse=True)[:3]:
        try:
            name = Path(f"/proc/{process}/comm").read_text().strip()
        except OSError:
            continue
        if used[process] > 0:
            named.append(f"{name} (process {process}) {used[process] / seconds:.0%} of a core")
    return ", ".join(named)


def wait_until_quiet(busy: bool) -> None:
    """End the process if other processes keep using the machine, unless `busy` allows it."""
    if busy:
        return
    end = time.monotonic() + PATIENCE
    told = False
    while True:
        before, others = used_by_process(), Others()
        time.sleep(LOOK)
        share = others.share()
        if share <= BUSY:
            return
        line = f"bench: other processes have {share:.0%} of the cores ({busiest(before, LOOK)})"
        if time.monotonic() > end:
            sys.exit(f"{line}: figures would be wrong (--busy measures anyway)")
        if not told:
            print(f"{line}, waiting {PATIENCE} s at most", file=sys.stderr)
            told = True


def ceilings_before(busy: bool) -> dict[str, float]:
    wait_until_quiet(busy)
    return ceilings()


def combined(before: dict[str, float]) -> dict[str, float]:
    """The better of `before` and a new measurement after the rows. Empty if they do not agree even
    when measured again."""
    for _ in range(3):
        after = ceilings()
        if not before or not after:
            return {}
        better = {name: max(before[name], after[name]) for name in before}
        apart = max(1 - min(before[name], after[name]) / better[name] for name in before)
        if apart <= SAME:
            return better
        before = better
    return {}
