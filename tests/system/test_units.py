"""Units of work: plan, markers, restart, killed workers, failures that name their units."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from unit_functions import fragile, square

from fastlm.errors import InputError
from fastlm.pipeline.executors import run_calls
from fastlm.pipeline.units import BuildError, Work, first_difference, group_by_size, run_step


def begin(folder: Path, **plan) -> Work:
    work = Work(folder / "work")
    work.begin({"values": [3, 1, 4, 1, 5], **plan})
    work.begin_step("square", units=5)
    work.begin_step("fragile", units=5)
    return work


def calls(folder: Path) -> list[int]:
    log = folder / "calls.log"
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def squares(work: Work, step: str = "square") -> list[str]:
    return [work.path(step, n, "square.txt").read_text() for n in range(5)]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_unit_is_done_once(tmp_path, workers):
    work = begin(tmp_path)
    run_step(work, square, range(5), workers=workers)
    assert squares(work) == ["9\n", "1\n", "16\n", "1\n", "25\n"]
    assert [work.counts("square", n)["value"] for n in range(5)] == [3, 1, 4, 1, 5]
    assert sorted(calls(tmp_path)) == [0, 1, 2, 3, 4]
    run_step(work, square, range(5), workers=workers)
    assert len(calls(tmp_path)) == 5
    assert not list((tmp_path / "work" / "square").glob(".*"))


@pytest.mark.parametrize("damage", ["no marker", "cut", "changed", "bad marker", "other plan"])
def test_only_units_without_a_valid_marker_are_done_again(tmp_path, damage):
    work = begin(tmp_path, lines=100)
    run_step(work, square, range(5))
    file, marker = work.path("square", 2, "square.txt"), work.marker_path("square", 2)
    data = file.read_bytes()
    if damage == "no marker":
        marker.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "changed":  # the size is the same: only the SHA-256 shows it
        file.write_bytes(data.replace(b"6", b"7", 1))
    elif damage == "bad marker":
        marker.write_text("{")
    else:
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "plan": "0"}))
    run_step(work, square, range(5))
    assert sorted(calls(tmp_path)) == [0, 1, 2, 2, 3, 4]
    assert file.read_bytes() == data


def test_a_changed_plan_is_refused_and_the_difference_named(tmp_path):
    work = begin(tmp_path)
    again = Work(work.folder)
    again.begin({"values": [3, 1, 4, 1, 5]})
    before = (work.folder / "plan.json").read_bytes()
    for plan, message in (
        ({"values": [3, 1, 4, 2, 5]}, r"values\[3\] was 1, now 2"),
        ({"values": [3]}, "values had 5 entries, now 1"),
        ({"values": [3, 1, 4, 1, 5], "seconds": 1}, "seconds was None, now 1"),
    ):
        with pytest.raises(BuildError, match=message):
            again.begin(plan)
    assert (work.folder / "plan.json").read_bytes() == before


def test_parameters_of_a_step_stay_after_a_restart(tmp_path):
    work = begin(tmp_path)
    assert work.begin_step("match", units=4) == {"units": 4}
    assert Work(work.folder).begin_step("match", units=9) == {"units": 4}
    assert work.parameters("match")["units"] == 4


def test_a_killed_worker_is_replaced(tmp_path):
    work = begin(tmp_path, fates={"1": "kill once", "3": "kill once"})
    run_step(work, fragile, range(5), workers=2)
    assert squares(work, "fragile") == ["9\n", "1\n", "16\n", "1\n", "25\n"]


def test_a_unit_that_kills_its_worker_every_time_is_named(tmp_path):
    work = begin(tmp_path, fates={"1": "kill"})
    with pytest.raises(BuildError, match=r"'fragile'.*failed: .*1.*killed 3 times"):
        run_step(work, fragile, range(5), workers=2)
    assert work.marker("fragile", 1) is None
    assert work.marker("fragile", 4) is not None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bug_in_one_unit_does_not_stop_the_others(tmp_path, workers):
    work = begin(tmp_path, fates={"0": "bug", "3": "bug"})
    with pytest.raises(BuildError, match=r"failed: 0, 3; unit 0: KeyError: 'oops'"):
        run_step(work, fragile, range(5), workers=workers)
    assert [work.marker("fragile", n) is not None for n in range(5)] == [False, True, True, False,
                                                                        True]  # fmt: skip


def test_an_exception_that_cannot_be_pickled_is_named(tmp_path):
    work = begin(tmp_path, fates={"1": "odd bug"})
    with pytest.raises(BuildError, match=r"failed: 1; unit 1: .*PairError: one and two"):
        run_step(work, fragile, range(5), workers=2)
    assert work.marker("fragile", 4) is not None


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_stops_the_step(tmp_path, workers):
    work = begin(tmp_path, fates={"0": "bad input"})
    with pytest.raises(InputError, match="page: expected text") as caught:
        run_step(work, fragile, range(5), workers=workers)
    assert not isinstance(caught.value, BuildError)


def test_a_full_disk_stops_the_step_and_a_restart_finishes(tmp_path, monkeypatch):
    work = begin(tmp_path)
    replace, full = os.replace, [True]

    def refuse(source, target):
        if full[0] and "00003." in str(target):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(BuildError, match="square: cannot be written: No space left on device"):
        run_step(work, square, range(5))
    full[0] = False
    run_step(work, square, range(5))
    assert squares(work) == ["9\n", "1\n", "16\n", "1\n", "25\n"]
    assert calls(tmp_path) == [0, 1, 2, 3, 3, 4]


BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from unit_functions import square
from fastlm.pipeline.units import Work, run_step
if __name__ == "__main__":
    work = Work(Path(sys.argv[1]) / "work")
    work.begin({"values": [3, 1, 4, 1, 5], "seconds": 0.3})
    work.begin_step("square", units=5)
    run_step(work, square, range(5), workers=2)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    support = Path(__file__).parents[1] / "support"
    command = [sys.executable, script, tmp_path, support]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not calls(tmp_path):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 3  # two workers and multiprocessing's resource tracker
    process.kill()
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)
    done = len(list((tmp_path / "work/square").glob("0*.json")))
    subprocess.run(command, check=True, timeout=60)
    assert squares(Work(tmp_path / "work")) == ["9\n", "1\n", "16\n", "1\n", "25\n"]
    assert len(calls(tmp_path)) <= 5 + 2  # those that were under way are done again
    assert done < 5


def test_ctrl_c_ends_the_workers(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    support = Path(__file__).parents[1] / "support"
    process = subprocess.Popen(
        [sys.executable, script, tmp_path, support], stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not calls(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    assert stderr.count("Traceback") <= 1 and "KeyboardInterrupt" in stderr


def test_unknown_executor():
    with pytest.raises(InputError, match="executor: expected one of pool, ray, got 'dask'"):
        run_calls(print, [1], executor="dask")


def test_differences_and_groups():
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a[1].b was 2, now 3"
    assert first_difference({}, {"c": "x"}) == "c was None, now 'x'"
    assert group_by_size([5, 5, 1, 12, 3], 10) == [[0, 1], [2, 3], [4]]
    assert group_by_size([], 10) == []
