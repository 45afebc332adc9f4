"""Kill a build of pages at random moments and compare its result with an undisturbed one.

    python bench/corpus/crash.py [--kills 20] [--seed 1] [--megabytes 160]

Input: the WARC files of `bench/corpus/pages.py`, two workers, units of 1 MB. Each kill is SIGKILL,
of the command or of one of its workers, at a moment drawn from a quarter of the time of the
undisturbed build. A command that ends (all kills were of workers, or a unit lost its worker three
times) is started again; a build that finishes before the last kill is repeated in a new folder.
Every finished build must have the bytes of the undisturbed one. Units are counted by their own log.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from logged_units import LOG, PROGRAM, repeated_units
from pages import warc_pages, work_folder
from printing import print_rows
from processes import ROOT, environment, session_processes

WORKERS = 2
UNIT_BYTES = 1_000_000
EXIT_SECONDS = 20  # for workers to notice that their parent was killed
RECORD = "record.json"
MAX_STARTS = 200
MAX_SECONDS = 1800  # of one start


def row(bar: str, value: object, target: object, unit: str, note: str = "") -> dict:
    return {"bar": f"crash: {bar}", "value": value, "target": target, "unit": unit, "note": note}


def start(folder: Path, out: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, "data", "prepare", folder, "-o", out]
    command += ["--workers", WORKERS, "--unit-bytes", UNIT_BYTES]
    variables = {**environment(), LOG: str(log), "PYTHONPATH": str(Path(__file__).parent)}
    with open(out.with_suffix(".output"), "ab") as output:
        return subprocess.Popen(
            [str(word) for word in command], env=variables, cwd=ROOT, start_new_session=True,
            stdout=output, stderr=output,
        )  # fmt: skip


def workers_of(pid: int) -> list[int]:
    """Return the worker processes of a command: not multiprocessing's resource tracker."""
    workers = []
    for other in session_processes(pid):
        try:
            command = Path(f"/proc/{other}/cmdline").read_bytes()
        except OSError:
            continue
        if other != pid and b"spawn_main" in command:
            workers.append(other)
    return workers


def contents(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a corpus. The record of the command has times."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*")) if path.is_file() and path.name != RECORD
    }  # fmt: skip


def processes_left(pid: int) -> int:
    """Return how many processes of a killed command are still there after `EXIT_SECONDS`."""
    deadline = time.monotonic() + EXIT_SECONDS
    while (remaining := session_processes(pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for other in remaining:
        os.kill(other, signal.SIGKILL)
    return len(remaining)


def rows(kills: int = 20, seed: int = 1, size: int = 160_000_000) -> list[dict]:
    """Measure; return {bar, value, target, unit, note} of each bar. Some 5 minutes of CPU time."""
    folder, facts = warc_pages(size)
    home = work_folder() / "crash"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    rng = random.Random(seed)
    begin = time.monotonic()
    process = start(folder, home / "undisturbed", home / "undisturbed.log")
    if process.wait(MAX_SECONDS):
        raise RuntimeError((home / "undisturbed.output").read_text()[-2000:])
    seconds = time.monotonic() - begin
    expected = contents(home / "undisturbed")
    total, _, _ = repeated_units(home / "undisturbed.log")

    done = different = left = builds = starts = 0
    ended = repeated = after = 0
    parents = 0
    while done < kills:
        out, log = home / f"build-{builds}", home / f"build-{builds}.log"
        builds += 1
        finished = False
        while not finished and starts < MAX_STARTS:
            process = start(folder, out, log)
            starts += 1
            moments = []
            while process.poll() is None and done + len(moments) < kills:
                moment = time.monotonic() + rng.uniform(0, seconds / 4)
                while time.monotonic() < moment and process.poll() is None:
                    time.sleep(0.02)
                victims = [process.pid] if rng.random() < 0.5 else workers_of(process.pid)
                if process.poll() is not None or not victims:
                    continue
                victim = rng.choice(victims)
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:  # it has just ended
                    continue
                moments.append(victim)
                parents += victim == process.pid
                if victim == process.pid:
                    break
            process.wait(MAX_SECONDS)
            left += processes_left(process.pid)
            done += len(moments)
            finished = process.returncode == 0
        different += contents(out) != expected
        one = repeated_units(log)
        ended, repeated, after = ended + one[0], repeated + one[1], after + one[2]
        shutil.rmtree(out)
    killed = f"{done} kills, {parents} of the command, in {builds} builds; seed {seed}"
    return [
        row("kills", done, kills, "kills", f"{facts['pages']:,} pages, {seconds:.0f} s"),
        row("finished builds with other bytes", different, 0, "builds", killed),
        row("units done again after they had ended", after, 0, "units", f"of {total} in a build"),
        row(
            "units begun again", repeated, done * WORKERS, "units",
            f"at most {WORKERS} are under way at a kill; {ended} ended",
        ),
        row("processes left", left, 0, "processes", f"{EXIT_SECONDS} s after the command ended"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=160)
    options = parser.parse_args()
    print_rows(rows(options.kills, options.seed, options.megabytes * 1_000_000))


if __name__ == "__main__":
    main()
