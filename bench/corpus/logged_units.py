"""Run the command line of fastlm and log each unit of work that begins and ends.

    FASTLM_UNIT_LOG=units.log python -c "import logged_units; logged_units.main()" data prepare ...

A line is ``begin STEP NUMBER`` or ``end STEP NUMBER CPU-SECONDS``. Workers log, too: they import
this module, which must be in PYTHONPATH. A unit that ends has its marker.
"""

import os
import time
from collections import Counter, defaultdict
from pathlib import Path

from fastlm.pipeline import units

LOG = "FASTLM_UNIT_LOG"
PROGRAM = "import logged_units; logged_units.main()"
_do_unit = units.do_unit


def do_unit(function, work, number: int) -> None:
    step = units.step_name(function)
    _log(f"begin {step} {number}")
    start = time.process_time()
    _do_unit(function, work, number)
    _log(f"end {step} {number} {time.process_time() - start}")


def _log(line: str) -> None:
    file = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def main() -> None:
    from fastlm import cli

    units.do_unit = do_unit
    cli.main()


def unit_seconds(log: Path) -> dict[str, list[float]]:
    """Return the CPU seconds of the units of each step."""
    seconds = defaultdict(list)
    for line in log.read_text().splitlines():
        if line.startswith("end "):
            _, step, _, value = line.split()
            seconds[step].append(float(value))
    return dict(seconds)


def repeated_units(log: Path) -> tuple[int, int, int]:
    """Return (units that ended, begun more often than once, begun after they had ended)."""
    begun: Counter[str] = Counter()
    ended: set[str] = set()
    after = 0
    for line in log.read_text().splitlines():
        event, step, number, *_ = line.split()
        unit = f"{step} {number}"
        if event == "end":
            ended.add(unit)
        else:
            begun[unit] += 1
            after += unit in ended
    return len(ended), sum(count - 1 for count in begun.values()), after
