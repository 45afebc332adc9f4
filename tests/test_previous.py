"""Setting a training aside: cut off at every rename, it is finished by the next start."""

import os

import pytest

from fastlm.errors import InputError
from fastlm.runs import previous
from fastlm.runs.previous import finish_moving, set_aside


class Killed(BaseException):
    pass


def run_folder(out, old: bool):
    (out / "model").mkdir(parents=True)
    (out / "model/weights").write_text("second")
    (out / "metrics.jsonl").write_text("lines")
    (out / "stages.json").write_text("record")
    if old:
        (out / "previous/model").mkdir(parents=True)
        (out / "previous/model/weights").write_text("first")
        (out / "previous/stages.json").write_text("record of the first")
    return out


def tree(out):
    return {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}


AFTER = {
    "previous/model/weights": "second",
    "previous/metrics.jsonl": "lines",
    "previous/stages.json": "record",
    "stages.json": "record",
}
NAMES = ("model", "metrics.jsonl", "report.html")


@pytest.mark.parametrize("old", [False, True])
def test_set_aside(tmp_path, old):
    out = run_folder(tmp_path, old)
    assert set_aside(out, NAMES, copies=["stages.json"]) == out / "previous"
    assert tree(out) == AFTER
    assert sorted(p.name for p in out.iterdir()) == ["previous", "stages.json"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("count", range(1, 5))  # two names, the old away, the new in
def test_cut_off_it_is_finished_by_the_next_start(tmp_path, monkeypatch, count, when):
    out, rename, calls = run_folder(tmp_path, old=True), os.rename, 0

    def dying(source, target):
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            raise Killed
        rename(source, target)
        if calls == count:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(previous.os, "rename", dying)
        with pytest.raises(Killed):
            set_aside(out, NAMES, copies=["stages.json"])
    assert "second" in tree(out).values()
    finish_moving(out)
    assert tree(out) == AFTER
    finish_moving(out)
    assert tree(out) == AFTER


def test_cut_off_before_it_is_decided_nothing_has_moved(tmp_path, monkeypatch):
    out = run_folder(tmp_path, old=True)
    before = tree(out)
    save = previous.save_atomic

    def dying(path, writer):
        if path.name == previous.MOVES:
            raise Killed
        save(path, writer)

    with monkeypatch.context() as patch:
        patch.setattr(previous, "save_atomic", dying)
        with pytest.raises(Killed):
            set_aside(out, NAMES, copies=["stages.json"])
    finish_moving(out)
    assert tree(out) == before and not list(out.glob(".previous*"))


def test_somebodys_own_folder_of_that_name_is_left_alone(tmp_path):
    out = run_folder(tmp_path, old=False)
    (out / "previous").mkdir()
    (out / "previous/mine").write_text("precious")
    with pytest.raises(InputError, match="previous: wanted the name for the training"):
        set_aside(out, NAMES, copies=["stages.json"])
    assert (out / "previous/mine").read_text() == "precious"
    assert (out / "model/weights").read_text() == "second"
