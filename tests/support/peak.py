"""The peak of a process's memory, as the kernel counts it for the running program.

getrusage's ru_maxrss is of no use: a child starts with the peak of its parent, so under a large
pytest it does not change.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def peak() -> int:
    """Return the peak of resident memory, MiB."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) >> 10


def growth(call: Callable[[], object]) -> int:
    """Return how much `call` adds to the peak of resident memory, MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = peak()
    call()
    return peak() - before


def run_script(script: str) -> list[int]:
    """Return the numbers that `script` prints in a separate process, so that the allocator holds no
    memory that other tests have freed. The script may import this module.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(part) for part in done.stdout.split()]
