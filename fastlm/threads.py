"""The threads of a ``fastlm`` command: how many there are, and how they wait.

OpenMP reads its environment when torch is loaded, so `configure_threads` must run before that. A
library must not change its process's environment, so only the command line calls it.
docs/troubleshooting.md lists the variables to export.

Rejected: loky's ``cpu_count(only_physical_cores=True)``. It counts all cores of the machine, even
where a process may use only some of them, and reads only the quota of the outermost group.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from fastlm.startup import fast_imports

# Rounds that a waiting thread spins before it sleeps: about 0.1 ms. libgomp's default of 300,000 is
# 3 ms, even if the other thread has lost its core to another process (bench/train/loaded.py).
SPIN_ROUNDS = "10000"


def configure_threads(threads: int | None = None) -> int | None:
    """Configure `threads` threads (default: `default_threads`) that sleep after a wait of 0.1 ms,
    and return ``threads``. Call it before torch is loaded. It keeps variables that the user has
    exported, but `threads` overrides OMP_NUM_THREADS. If torch is already loaded, only an explicit
    `threads` has an effect.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)
    if threads is None:
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
            os.environ.setdefault(name, str(default_threads()))
        return None
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # for the tokenizers package
    with fast_imports():
        import torch

    torch.set_num_threads(threads)  # from the environment, torch uses at most the physical cores
    return threads


# The option of every command that computes
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        callback=configure_threads,
        help="Use this many threads; default: the available physical cores",
    ),
]


def default_threads(root: Path = Path("/")) -> int:
    """Return the number of physical cores that this process may use, at most its cgroup's quota.
    With one thread more, that thread would share a core or wait for one, and the others would wait
    for it.
    """
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(siblings.read_text() if siblings.exists() else cpu)
    return max(1, int(min(len(cores), quota(root))))


def quota(root: Path = Path("/")) -> float:
    """Return the number of CPUs that this process's cgroups (version 1 and 2) may use at a time;
    infinity: no limit."""
    groups = root / "proc/self/cgroup"
    min_quota = float("inf")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            folder = root / "sys/fs/cgroup/cpu"
        else:
            continue
        # the process's group and those above; a container sees only the outermost, the mount's root
        relative = Path(path.lstrip("/"))
        for group in (folder / part for part in (relative, *relative.parents)):
            min_quota = min(min_quota, _group_quota(group))
    return min_quota


def _group_quota(group: Path) -> float:
    try:
        if (both := group / "cpu.max").exists():
            limit, period = both.read_text().split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
    except OSError:  # a group without limits has no such file
        return float("inf")
    return float("inf") if limit == "max" or int(limit) < 0 else int(limit) / int(period)
