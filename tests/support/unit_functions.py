"""Steps of builds for tests/unit/test_units.py; worker processes import them from here."""

import os
import signal
import time
from pathlib import Path

from fastlm.errors import InputError


class PairError(Exception):
    """An exception that cannot be unpickled."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


def square(work, number: int, out: Path) -> dict:
    """Write the square of the unit's entry in the plan, after the time that the plan says."""
    time.sleep(work.plan.get("seconds", 0))
    log = work.folder.parent / "calls.log"
    with open(log, "a") as file:
        file.write(f"{number} {os.getpid()}\n")
    value = work.plan["values"][number]
    (out / "square.txt").write_text(f"{value * value}\n" * work.plan.get("lines", 1))
    return {"value": value}


def fragile(work, number: int, out: Path) -> dict:
    """As `square`; units of the plan's "kill" kill their process the first time or always."""
    fate = work.plan.get("fates", {}).get(str(number))
    mark = work.folder.parent / f"killed-{number}"
    if fate == "kill" or (fate == "kill once" and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "bad input":
        raise InputError("page: expected text, got none")
    if fate == "odd bug":
        raise PairError("one", "two")
    if fate == "bug":
        raise KeyError("oops")
    return square(work, number, out)
