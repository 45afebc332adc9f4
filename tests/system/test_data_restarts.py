"""What a build of a corpus leaves when it is killed, stopped or started twice, and what it must not
touch.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from warc_records import record

from fastlm.data import matching, steps
from fastlm.data import plan as plan_module
from fastlm.data import prepare as prepare_module
from fastlm.data.corpus import is_corpus, read_documents, read_units
from fastlm.data.plan import make_plan
from fastlm.data.prepare import DataOptions, prepare
from fastlm.errors import InputError
from fastlm.files import remove
from fastlm.pipeline import executors, units
from fastlm.pipeline.units import BuildError, file_sha256

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

    def stop(work, funnel):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "arrange", stop)
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
        arrange = prepare_module.arrange

        def counted(function):
            def call(*args, **kwargs):
                if count[0] == change:
                    os._exit(9)
                count[0] += 1
                return function(*args, **kwargs)

            return call

        def begin(work, funnel):
            for name in CHANGES:
                setattr(os, name, counted(getattr(os, name)))
            arrange(work, funnel)

        prepare_module.arrange = begin
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
        change += 3 if state != new_texts else 12  # then only the work is removed
    assert states[0] == old_texts and states[-1] == new_texts and None in states
    assert len(states) > 15


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


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_file_that_changes_after_it_was_hashed_is_named(pages, tmp_path, monkeypatch, moment):
    """A change of the same size; when the file is as before, a restart finishes, although its times
    are others.
    """
    build(pages, tmp_path / "expected")
    before = pages.read_bytes()
    read_files, out = steps.read_files, tmp_path / "out"

    def change() -> None:
        pages.write_bytes(before.replace(b"word", b"WORD"))

    def changed(*args, **kwargs):
        if moment == "before":
            pages.write_bytes(before)  # other times, the same content: no change
        for document in read_files(*args, **kwargs):
            if moment == "during":
                change()
            yield document

    begin = units.Work.begin_step

    def begin_step(work, step, **parameters):
        if moment == "before" and step == "read":
            change()
        return begin(work, step, **parameters)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "read_files", changed)
        patch.setattr(units.Work, "begin_step", begin_step)
        with pytest.raises(BuildError, match=r"pages\.jsonl: expected the file that was planned"):
            build(pages, out)
    assert not is_corpus(out)
    pages.write_bytes(before)
    build(pages, out)
    assert contents(out) == contents(tmp_path / "expected")


def test_a_touched_file_has_not_changed(pages, tmp_path, monkeypatch):
    stopped_before_publishing(pages, tmp_path / "out", monkeypatch)
    begin = units.Work.begin_step

    def begin_step(work, step, **parameters):
        os.utime(pages, (step == "read", 5))
        return begin(work, step, **parameters)

    monkeypatch.setattr(units.Work, "begin_step", begin_step)
    build(pages, tmp_path / "out")
    build(pages, tmp_path / "other")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_what_a_user_has_is_not_replaced(pages, tmp_path):
    for name in ("work/thesis.tex", "train/image.png", "train.jsonl.zst", "removed", "plan.json"):
        out = tmp_path / name.replace("/", "-") / "out"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(InputError, match=rf"out/{name.split('/')[0]}.*: expected"):
            build(pages, out)
        assert contents(out) == {name: b"mine"}


def test_the_output_is_no_input(pages, tmp_path, monkeypatch):
    """A corpus in the folder of its source: a restart and a second build do not read it."""
    out = tmp_path / "out"
    expected = build(tmp_path, tmp_path / "elsewhere").steps[0]
    shutil.rmtree(tmp_path / "elsewhere")
    stopped_before_publishing(tmp_path, out, monkeypatch)
    assert build(tmp_path, out).steps[0] == expected
    before = contents(out)
    build(tmp_path, out)
    assert contents(out) == before
    for source in (out / "train", next((out / "train").iterdir())):
        with pytest.raises(InputError, match=r"expected a source outside the output"):
            build(source, out)
    for earlier in (out, out / "train"):
        with pytest.raises(InputError, match=r"earlier: expected another corpus"):
            build(pages, out, earlier=(str(earlier),), heldout_bytes=5)
    assert contents(out) == before


def test_two_commands_in_one_folder(pages, tmp_path, monkeypatch):
    make_plan = prepare_module.make_plan

    def second(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, "make_plan", make_plan)
            with pytest.raises(InputError, match=r"out/work: another process works in this folder"):
                build(pages, tmp_path / "out")
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(prepare_module, "make_plan", second)
    build(pages, tmp_path / "out")
    assert not (tmp_path / "out" / "work").exists()


def test_a_full_disk_in_the_parent_keeps_the_work(pages, tmp_path, monkeypatch):
    out, done = tmp_path / "out", []
    replace, read = os.replace, steps.read

    def refuse(source, target):
        if Path(target).name == "step.json" and Path(target).parent.name == "apply":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    def counted(work, number, folder):
        done.append(number)
        return read(work, number, folder)

    counted.__name__ = "read"
    monkeypatch.setattr(steps, "read", counted)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(InputError, match="No space left on device"):
            build(pages, out)
    first = len(done)
    build(pages, out)
    assert first == len(done) >= 2


def test_a_full_disk_while_publishing(pages, tmp_path, monkeypatch):
    build(pages, tmp_path / "expected")
    replace, out = os.replace, tmp_path / "out"

    def refuse(source, target):
        if Path(target) == out / "units.json":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(InputError, match="No space left on device"):
            build(pages, out)
    build(pages, out)
    assert contents(out) == contents(tmp_path / "expected")


def test_a_pool_that_breaks_while_units_are_submitted_loses_none(monkeypatch):
    """A worker can be killed between two units: then the pool refuses the next one."""
    submit, broken = executors.ProcessPoolExecutor.submit, [True]

    def refuse(pool, *args, **kwargs):
        if broken.pop() if broken else False:
            raise executors.BrokenProcessPool("a worker was killed")
        return submit(pool, *args, **kwargs)

    monkeypatch.setattr(executors.ProcessPoolExecutor, "submit", refuse)
    outcomes = list(executors.run_calls(abs, range(3), workers=2))
    assert sorted(outcomes) == [(0, None), (1, None), (2, None)]


def test_names_with_tabs(tmp_path):
    folder = tmp_path / "so\turce"
    folder.mkdir()
    (folder / "a\tb.txt").write_text(prose(1))
    (folder / "new\nline.txt").write_text(prose(1).upper())
    build(folder, tmp_path / "out")
    records = [
        row for part in (tmp_path / "out" / "removed").iterdir() for row in steps.read_lines(part)
    ]
    assert [(r["id"], r["detail"]) for r in records] == [
        ("new\nline.txt", f"same text as {folder} a\tb.txt")
    ]


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_ctrl_c_with_two_workers(tmp_path, seconds):
    """One line, status 130; the work stays."""
    pages = write_lines(tmp_path / "pages.jsonl", [prose(n) for n in range(150)])
    command = [
        sys.executable, "-P", "-m", "fastlm", "data", "prepare", str(pages), "-o",
        str(tmp_path / "out"), "--workers", "2", "--unit-bytes", "10000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:  # the first worker starts
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr, stderr
    assert stderr.splitlines()[-1].startswith("fastlm: interrupted"), stderr
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert is_corpus(tmp_path / "out")


def test_limited_searches_for_near_copies_are_counted(tmp_path, monkeypatch):
    resolve = matching.resolve

    def limited(*args, **kwargs):
        return dataclasses.replace(resolve(*args, **kwargs), limited=2)

    monkeypatch.setattr(matching, "resolve", limited)
    texts = [f"{prose(n)} {end}" for n in range(3) for end in ("a", "b")]
    source = write_lines(tmp_path / "a.jsonl", texts)
    funnel = build(source, tmp_path / "out", heldout_bytes=0)
    step = next(step for step in funnel.steps if step["step"] == "near duplicates")
    assert step["removed"] == {"near duplicate": 3} and step.get("limited") == 3 * 2


def test_a_recipe_sees_changed_policies_and_earlier_corpora(pages, tmp_path):
    from fastlm.data.stage import Data
    from fastlm.sources.input_digest import InputDigest

    policies, earlier = tmp_path / "policies", tmp_path / "earlier"
    policies.mkdir()
    (policies / "a.warc").write_bytes(b"1")
    build(pages, earlier)
    stage = Data(sources=(str(pages),), policies=(str(policies),), earlier=(str(earlier),))

    def digest() -> str:
        state = stage.digest_inputs(InputDigest(tmp_path / "sources.json", cache=tmp_path))
        return json.dumps(state)

    digests = [digest(), digest()]
    (policies / "a.warc").write_bytes(b"2")
    digests.append(digest())
    write_lines(pages, [prose(50)])
    pages_digest = digest()
    build(pages, earlier)
    digests += [pages_digest, digest()]
    assert digests[0] == digests[1] and len({*digests}) == 4


def test_many_small_files_are_several_units(tmp_path):
    """A file costs time, whatever its size: a unit has at most 2,048 of them."""
    folder = tmp_path / "source"
    folder.mkdir()
    for n in range(3000):
        (folder / f"{n:04}.txt").write_text("a few words")
    work = units.Work(tmp_path / "work")
    with work.locked():
        options = DataOptions(unit_bytes=1 << 16)
        plan = make_plan(work, [str(folder)], options, cache=tmp_path)
    assert len(plan["units"]) == 2


def test_no_file_can_be_read(tmp_path, monkeypatch):
    def refuse(file, **options):
        raise OSError(5, "Input/output error", str(file.path))

    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text(prose(1))
    monkeypatch.setattr(plan_module, "scan_file", refuse)
    with pytest.raises(InputError, match=r"files that can be read, got none: .*output error"):
        build(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lists_are_read_once_and_a_changed_one_is_named(pages, tmp_path, monkeypatch):
    from fastlm.data.consent.opt_out import OptOut

    listed = tmp_path / "out.txt"
    listed.write_text("domain: example.org\n")
    load, loads = OptOut.load, []
    monkeypatch.setattr(OptOut, "load", lambda *paths: loads.append(paths) or load(*paths))
    build(pages, tmp_path / "out", opt_out=(str(listed),), unit_bytes=1000)
    assert len(loads) == 2  # for the plan, and by the worker
    begin = units.Work.begin_step

    def begin_step(work, step, **parameters):
        if step == "read":
            listed.write_text("domain: example.com\n")
        return begin(work, step, **parameters)

    monkeypatch.setattr(units.Work, "begin_step", begin_step)
    with pytest.raises(
        BuildError, match=r"files of the plan, but options\.opt_out_sha256\[0\] was"
    ):
        build(pages, tmp_path / "changed", opt_out=(str(listed),))


def test_the_parts_of_another_plan_are_not_published(pages, tmp_path, monkeypatch):
    """On object storage, a killed deletion can leave publishing.json alone."""
    build(pages, tmp_path / "expected")
    stopped_before_publishing(pages, tmp_path / "out", monkeypatch)
    state = {"plan": "another", "funnel": {}, "units": []}
    (tmp_path / "out" / "work" / "publishing.json").write_text(json.dumps(state))
    build(pages, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_strict_stops_at_a_policy_file_over_the_limit(tmp_path):
    page = f"<html><body><p>{prose(1)}</p></body></html>".encode()
    robots = b"User-agent: *\nAllow: /\n" + b"# filler\n" * 70_000
    archive = tmp_path / "a.warc"
    archive.write_bytes(
        record(0, page) + record(1, robots, "text/plain", url="http://example.org/robots.txt")
    )
    funnel = build(archive, tmp_path / "out", heldout_bytes=0)
    assert funnel.steps[0]["removed"].get("policy over the size limit") == 1
    with pytest.raises(InputError, match=r"strict: .*policy over the size limit: .*a\.warc"):
        build(archive, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()
