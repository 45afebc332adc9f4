"""Archiving a training: if it is cut off at any rename, the next start completes it."""

import os

import pytest

from fastlm.pipeline import archive as previous
from fastlm.pipeline.archive import archive, finish_moving


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


def after(to):
    return {
        f"{to}/model/weights": "second",
        f"{to}/metrics.jsonl": "lines",
        f"{to}/stages.json": "record",
        "stages.json": "record",
    }


OLD = {"previous/model/weights": "first", "previous/stages.json": "record of the first"}
NAMES = ("model", "metrics.jsonl", "report.html")


def test_archive(tmp_path):
    out = run_folder(tmp_path, old=False)
    assert archive(out, NAMES, copies=["stages.json"]) == out / "previous"
    assert tree(out) == after("previous")
    assert sorted(p.name for p in out.iterdir()) == ["previous", "stages.json"]


def test_what_was_archived_before_stays(tmp_path):
    out = run_folder(tmp_path, old=True)
    assert archive(out, NAMES, copies=["stages.json"]) == out / "previous-2"
    assert tree(out) == after("previous-2") | OLD
    # anything else with the name is left alone: a user's folder, a link to nowhere
    (out / "previous-3").symlink_to("nowhere")
    (out / "model").mkdir()
    assert archive(out, NAMES, copies=["stages.json"]) == out / "previous-4"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("count", range(1, 3))  # of names that move
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
            archive(out, NAMES, copies=["stages.json"])
    assert "second" in tree(out).values()
    for _ in range(2):
        finish_moving(out)
        assert tree(out) == after("previous-2") | OLD


def test_cut_off_before_it_is_decided_nothing_has_moved(tmp_path, monkeypatch):
    out = run_folder(tmp_path, old=True)
    before = tree(out)

    def dying(path, value):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(previous, "write_json", dying)
        with pytest.raises(Killed):
            archive(out, NAMES, copies=["stages.json"])
    finish_moving(out)
    assert tree(out) == before and not list(out.glob(".previous*"))
