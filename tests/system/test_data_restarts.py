"""What a build of a corpus leaves when it is killed, stopped or started twice, and what it must not
touch.
"""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest

from fastlm.data import prepare as prepare_module
from fastlm.data.corpus import is_corpus, read_documents, read_units
from fastlm.data.prepare import DataOptions, prepare
from fastlm.errors import InputError
from fastlm.files import remove
from fastlm.pipeline.units import file_sha256

WORDS = [f"word{n}" for n in range(5000)]
COMMON = "the of and to be that have with".split()


def prose(seed: int, words: int = 80) -> str:
    rng = random.Random(seed)
    chosen = [*rng.sample(WORDS, words), *COMMON * 3]
    rng.shuffle(chosen)
    return " ".join(chosen) + "."


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def build(source: Path | list, out: Path, **options):
    sources = [str(s) for s in (source if isinstance(source, list) else [source])]
    defaults = {"unit_bytes": 4000, "heldout_bytes": 1000, "heldout_fraction": 0.5}
    return prepare(sources, out, options=DataOptions(**{**defaults, **options}), cache=out.parent)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def texts(out: Path) -> set[str]:
    return {d.text for split in ("train", "heldout") for d in read_documents(out, split)}


@pytest.fixture
def pages(tmp_path) -> Path:
    return write_lines(tmp_path / "pages.jsonl", [*map(prose, range(12)), prose(3).upper()])


class Stop(BaseException):
    """Ends a build as a kill does."""


def stopped_before_publishing(source: Path, out: Path, monkeypatch, **options) -> None:
    """Do a build up to the moment when its parts are moved to their place."""

    def stop(work):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_arrange", stop)
        with pytest.raises(Stop):
            build(source, out, **options)


CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "link", "fsync")


def killed_at(change: int, source: Path, out: Path) -> bool:
    """Publish in another process, which ends without any clean-up at its change ``change`` of the
    file system. Return False if it finished before.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads are not copied; the process uses none
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        count = [0]
        arrange = prepare_module._arrange

        def counted(function):
            def call(*args, **kwargs):
                if count[0] == change:
                    os._exit(9)
                count[0] += 1
                return function(*args, **kwargs)

            return call

        def begin(work):
            for name in CHANGES:
                setattr(os, name, counted(getattr(os, name)))
            arrange(work)

        prepare_module._arrange = begin
        build(source, out)
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_a_kill_at_any_change_of_publishing(pages, tmp_path, monkeypatch):
    """Whatever the moment: the folder has no funnel, or is the old or the new corpus; a restart
    gives the same bytes as a build that was not killed.
    """
    old = write_lines(tmp_path / "old.jsonl", [prose(n) for n in range(100, 106)])
    before, ready = tmp_path / "before", tmp_path / "ready"
    build(old, before, unit_bytes=700)
    shutil.copytree(before, ready)
    (ready / "forget_log.jsonl").write_text("")
    (ready / "shards").mkdir()
    (ready / "shards" / "00000.bin").write_bytes(b"tokens")
    stopped_before_publishing(pages, ready, monkeypatch)
    build(pages, tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    users = {"forget_log.jsonl": b"", "shards/00000.bin": b"tokens"}
    old_texts, new_texts, states = texts(before), texts(tmp_path / "expected"), []
    out, change = tmp_path / "out", 0
    while change < 1000:
        remove(out)
        shutil.copytree(ready, out)
        is_killed = killed_at(change, pages, out)
        state = texts(out) if is_corpus(out) else None
        assert state in (None, old_texts, new_texts), change
        if state is not None:
            for record in read_units(out):
                assert file_sha256(out / record["part"]) == record["sha256"], change
        states.append(state)
        if is_killed:
            build(pages, out)
        assert contents(out) == expected | users, change
        if not is_killed:
            break
        change += 1 if state != new_texts else 12  # then only the work is removed
    assert states[0] == old_texts and states[-1] == new_texts and None in states
    assert len(states) > 40


def test_a_kill_in_publishing_and_then_another_plan(pages, tmp_path, monkeypatch):
    """The corpus that was complete is published, whatever its sources are now, and then replaced
    by the new one when that is complete.
    """
    ready, out = tmp_path / "ready", tmp_path / "out"
    build(write_lines(tmp_path / "old.jsonl", [prose(100)]), ready)
    stopped_before_publishing(pages, ready, monkeypatch)
    build(pages, tmp_path / "expected")
    expected = texts(tmp_path / "expected")
    pages_now = pages.read_text()
    later = write_lines(tmp_path / "later.jsonl", [prose(200), prose(201)])
    moments = 0
    for change in range(0, 1000, 9):
        remove(out)
        shutil.copytree(ready, out)
        pages.write_text(pages_now)
        if not killed_at(change, pages, out):
            break
        if not (out / "work" / "publishing.json").exists():
            continue
        pages.unlink()
        moments += 1
        with pytest.raises(InputError, match=r"missing\.jsonl: .*not found"):
            build(tmp_path / "missing.jsonl", out)
        assert texts(out) == expected, change
        build(later, out)
        assert texts(out) == {prose(200), prose(201)}
        assert not (out / "work").exists()
    assert moments > 2
