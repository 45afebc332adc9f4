"""Builds of a corpus: near duplicates, clusters, earlier builds, and what a crash leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data import matching
from fastlm.data.corpus import read_documents, read_units
from fastlm.data.options import parse_size
from fastlm.data.prepare import DataOptions, prepare
from fastlm.data.unit_files import read_lines
from fastlm.errors import InputError

WORDS = Path(__file__).read_text().split()
COMMON = "the of and to be that have with".split()


def prose(seed: int, words: int = 150) -> str:
    """Return paragraphs of words in random order, which no rule removes."""
    rng = random.Random(seed)
    vocabulary = [f"word{rng.randrange(20_000)}" for _ in range(words)] + COMMON * 4
    rng.shuffle(vocabulary)
    lines = [" ".join(vocabulary[i : i + 12]) for i in range(0, len(vocabulary), 12)]
    return ".\n\n".join(lines) + "."


def edited(text: str, seed: int) -> str:
    """Return a copy of which two words are replaced: about 0.9 of its word 5-grams stay."""
    rng = random.Random(seed)
    words = text.split(" ")
    for _ in range(2):
        words[rng.randrange(len(words))] = f"edit{rng.randrange(10**6)}"
    return " ".join(words)


def build(source: Path | list[Path], out: Path, **options):
    sources = [str(s) for s in (source if isinstance(source, list) else [source])]
    defaults = {"min_paragraph": 10**6, "unit_bytes": 20_000}
    return prepare(sources, out, options=DataOptions(**{**defaults, **options}), cache=out.parent)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def removed(out: Path) -> list[dict]:
    return [row for part in sorted((out / "removed").iterdir()) for row in read_lines(part)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def pages(tmp_path) -> Path:
    """60 texts, near copies of 12 of them far away, and one equal text."""
    texts = [prose(i) for i in range(60)]
    copies = [edited(texts[i], i) for i in range(0, 60, 5)]
    return write_lines(tmp_path / "pages.jsonl", [*texts, *copies, texts[7].upper()])


def test_near_copies_go_and_the_record_says_what_they_copy(pages, tmp_path):
    funnel = build(pages, tmp_path / "out", heldout_bytes=0)
    steps = {s["step"]: s for s in funnel.steps}
    assert steps["near duplicates"]["removed"] == {"near duplicate": 12}
    assert steps["exact duplicates"]["removed"] == {"same text": 1}
    documents = {d.id: d for d in read_documents(tmp_path / "out", "train")}
    records = removed(tmp_path / "out")
    assert len(documents) == 60 and len(records) == 13
    for record in records:
        detail, url, id = record["detail"].rpartition(f" {record['source']} ")
        assert id in documents and url, record
        if record["reason"] == "near duplicate":
            assert 0.8 <= float(detail.partition(" ")[0]) < 1
            assert documents[id].meta["cluster_size"] == 2
        else:
            assert record["id"] == "pages.jsonl:73" and id == "pages.jsonl:8"
    clusters = [d.meta["cluster"] for d in documents.values()]
    assert len(set(clusters)) == 60
    assert len(read_units(tmp_path / "out")) == len(list((tmp_path / "out/train").iterdir())) >= 3
    kept_all = build(pages, tmp_path / "all", heldout_bytes=0, near_duplicates=0)
    assert kept_all.steps[-2]["documents"] == 72


def test_a_source_that_loses_more_than_half_is_named(tmp_path):
    copies = write_lines(tmp_path / "copies.jsonl", [edited(prose(1), i) for i in range(9)])
    pages = write_lines(tmp_path / "pages.jsonl", [prose(i) for i in range(20)])
    funnel = build([pages, copies], tmp_path / "out", heldout_bytes=0)
    assert funnel.warnings == [
        f"{copies}: 9 of 9 documents are near duplicates of others and were removed"
    ]


def test_a_corpus_does_not_depend_on_memory_and_workers(pages, tmp_path):
    results = []
    for n, options in enumerate(({"memory": "64MiB"}, {"memory": "2GB", "workers": 2})):
        build(pages, tmp_path / str(n), heldout_bytes=5000, **options)
        results.append(contents(tmp_path / str(n)))
    assert results[0] == results[1]
    # 64 MiB hold the keys of all these pages: force many ranges
    from fastlm.data import matching

    before = matching.RECORD_BYTES
    matching.RECORD_BYTES = 1 << 14
    try:
        build(pages, tmp_path / "many", heldout_bytes=5000, memory="64MiB")
    finally:
        matching.RECORD_BYTES = before
    assert contents(tmp_path / "many") == results[0]


def test_held_out_text_has_no_near_copy_in_training(tmp_path):
    """A chain: each text is like the next, the first is unlike the last. What is left of a chain is
    in one part.
    """
    texts = []
    for chain in range(12):
        text = prose(chain, 200)
        for link in range(8):
            texts.append(text)
            text = edited(edited(text, link), link + 100)
    out = tmp_path / "out"
    build(write_lines(tmp_path / "chains.jsonl", texts), out, heldout_bytes=20_000,
          heldout_fraction=0.5)  # fmt: skip
    parts = {s: [d.meta for d in read_documents(out, s)] for s in ("train", "heldout")}
    clusters = {s: {meta["cluster"] for meta in metas} for s, metas in parts.items()}
    assert clusters["train"] and clusters["heldout"]
    assert not clusters["train"] & clusters["heldout"]
    assert len(parts["train"]) + len(parts["heldout"]) > 12, "a chain leaves several documents"


def test_documents_of_an_earlier_build_win(pages, tmp_path):
    earlier = write_lines(tmp_path / "earlier.jsonl", [edited(prose(3), 1), prose(4), prose(500)])
    build(earlier, tmp_path / "first", heldout_bytes=0)
    funnel = build(pages, tmp_path / "out", earlier=(str(tmp_path / "first"),), heldout_bytes=0)
    steps = {s["step"]: s for s in funnel.steps}
    assert steps["gather"]["documents"] == 73
    assert steps["exact duplicates"]["removed"] == {"same text": 2}
    assert steps["near duplicates"]["removed"] == {"near duplicate": 13}
    texts = {d.text for d in read_documents(tmp_path / "out", "train")}
    assert len(texts) == 58 and not texts & {prose(3), prose(4), prose(500)}
    details = [r["detail"] for r in removed(tmp_path / "out")]
    assert sum(f"{tmp_path}/earlier.jsonl" in detail for detail in details) == 2
    with pytest.raises(InputError, match=r"earlier: expected a corpus .*none not found"):
        build(pages, tmp_path / "bad", earlier=(str(tmp_path / "none"),))


def test_what_an_earlier_corpus_forgot_stays_away(tmp_path):
    old = write_lines(tmp_path / "old.jsonl", [prose(i) for i in range(4)])
    new = write_lines(tmp_path / "new.jsonl", [prose(2), prose(9)])
    build(old, tmp_path / "first", heldout_bytes=0)
    for command in (
        ["forget", tmp_path / "first", "--target", "old.jsonl:3"],
        ["prepare", new, "-o", tmp_path / "next", "--earlier", tmp_path / "first",
         "--heldout-bytes", "0"],
    ):  # fmt: skip
        result = CliRunner().invoke(app, ["data", *map(str, command)])
        assert result.exit_code == 0, result.output
    assert [d.text for d in read_documents(tmp_path / "next", "train")] == [prose(9)]
    assert [r["reason"] for r in removed(tmp_path / "next")] == ["forgotten"]


def test_policies_without_an_archive_are_refused(pages, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "robots.txt").write_text("User-agent: *\nDisallow: /\n")
    with pytest.raises(InputError, match="policies: expected WARC files"):
        build(pages, tmp_path / "out", policies=(str(tmp_path / "site"),))
    assert not (tmp_path / "out").exists()


def test_max_bytes_ends_the_gathering_early(tmp_path):
    texts = [prose(i) for i in range(300)]
    source = write_lines(tmp_path / "pages.jsonl", texts)
    out = tmp_path / "out"
    funnel = build(source, out, max_bytes=50_000, heldout_bytes=0)
    documents = list(read_documents(out, "train"))
    size = sum(len(d.text.encode()) for d in documents)
    assert 50_000 <= size < 50_000 + max(map(len, texts))
    assert [d.id for d in documents] == [f"pages.jsonl:{i + 1}" for i in range(len(documents))]
    assert funnel.steps[0]["documents"] < 100


def test_memory_does_not_grow_with_paragraphs_and_documents(tmp_path, monkeypatch):
    """Keys of all paragraphs in one set took 82 bytes each, 200 bytes a document."""
    # as with less memory than --memory accepts
    monkeypatch.setattr(matching, "ranges_for", lambda records, *_: 1 + records // 3000)
    peaks = []
    for size in (20, 300, 900):  # the first one imports everything
        with open(tmp_path / "pages.jsonl", "w") as file:
            for i in range(size):
                text = "\n\n".join(f"{i} {k} {i * 50 + k:x}" for k in range(50))
                file.write(json.dumps({"text": text}) + "\n")
        tracemalloc.start(1)
        build(
            tmp_path / "pages.jsonl", tmp_path / str(size), rules=(), scrub=(), min_paragraph=5,
            language_method="off", near_duplicates=0, unit_bytes=100_000, heldout_bytes=0,
        )  # fmt: skip
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        documents = read_documents(tmp_path / str(size), "train")
        assert sum(document.text.count("\n\n") + 1 for document in documents) == 50 * size
    more = peaks[2] - peaks[1]
    assert more < 600 * 50 * 20, f"{more / 600:.0f} bytes more for each document of 50 paragraphs"


@pytest.mark.parametrize("name", ["a", "12XB", "-1GB", "1.5.2MB"])
def test_sizes_that_are_none(name):
    with pytest.raises(InputError, match="memory: expected a size such as"):
        parse_size(name, "memory")


def test_sizes():
    sizes = {"512MB": 512e6, "2GiB": 2 << 30, "1.5 kb": 1500, "70000000": 7e7, "1t": 1e12}
    assert {text: parse_size(text, "memory") for text in sizes} == sizes


def test_a_changed_plan_is_refused(pages, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt, match=f"the same command continues the build in {out}"):
        build(pages, out)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"plan that was begun.* options.max_words was 100000"):
        build(pages, out, max_words=500)
    with open(pages, "a") as file:
        file.write(json.dumps({"text": prose(777)}) + "\n")
    with pytest.raises(InputError, match=r"plan that was begun.* files\[0\]\.(size|sha256) was"):
        build(pages, out)
    shutil.rmtree(out / "work")
    build(pages, out)


def interrupt_after(monkeypatch, markers: int) -> None:
    """Raise KeyboardInterrupt in place of the marker after ``markers`` of them."""
    from fastlm.pipeline import units

    write, count = units.write_durably, [0]

    def interrupted(path, value):
        if path.name[:5].isdigit():
            count[0] += 1
            if count[0] > markers:
                raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(units, "write_durably", interrupted)


def test_a_finished_corpus_is_not_built_again(pages, tmp_path):
    out = tmp_path / "out"
    first = build(pages, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.*")}
    assert build(pages, out) == first
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.*")} == before
    part = next((out / "train").iterdir())
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    build(pages, out)
    assert part.read_bytes() == data


def test_strict_stops_at_the_first_fault(pages, tmp_path):
    with open(pages, "a") as file:
        file.write("{oops\n")
    assert build(pages, tmp_path / "a").steps[0]["removed"] == {"line: malformed": 1}
    with pytest.raises(
        InputError, match=r"strict: expected no fault, got line: malformed.*line 74"
    ):
        build(pages, tmp_path / "b", strict=True)


@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_random_kills_change_no_byte(pages, tmp_path, victim):
    """The command is killed several times at random moments, then finishes."""
    build(pages, tmp_path / "expected", heldout_bytes=5000)
    expected = contents(tmp_path / "expected")
    command = [
        sys.executable, "-P", "-m", "fastlm", "data", "prepare", str(pages), "-o",
        str(tmp_path / "out"), "--workers", "2", "--unit-bytes", "20000", "--min-paragraph",
        "1000000", "--heldout-bytes", "5000",
    ]  # fmt: skip
    rng = random.Random(victim)
    out, deadline, kills = tmp_path / "out", time.monotonic() + 300, 0
    while kills < 4:
        if (out / "funnel.json").exists():  # it finished before it was killed
            shutil.rmtree(out)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        workers: list[int] = []
        while process.poll() is None and len(workers) < 3:  # two and a tracker of resources
            assert time.monotonic() < deadline
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            workers = [int(child) for child in children.read_text().split()]
            time.sleep(0.01)
        time.sleep(0.3 + rng.random())
        try:
            os.kill(process.pid if victim == "parent" else rng.choice(workers), signal.SIGKILL)
            kills += 1
        except ProcessLookupError:
            pass
        process.wait(timeout=120)
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.02)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    actual = contents(out)
    del actual["record.json"]
    assert actual == expected
