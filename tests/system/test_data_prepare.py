"""The full stage: funnel, split, determinism, refusals, the command line."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.corpus import read_documents
from fastlm.data.personal import DEFAULT_KINDS
from fastlm.data.prepare import DataOptions, prepare
from fastlm.errors import InputError
from fastlm.pipeline.funnel import Funnel
from fastlm.pipeline.registry import open_registry

WORDS = "the of and to model token weight page line file data with have that read write".split()


def prose(seed: int, words: int = 120) -> str:
    rng = random.Random(seed)
    lines = [
        " ".join(rng.choice(WORDS) + rng.choice("abc") for _ in range(12))
        for _ in range(words // 12)
    ]
    return "\n\n".join(f"The start and the end of {seed}: {line}." for line in lines)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """40 good documents, and one for every rule that removes documents."""
    d = tmp_path / "corpus"
    d.mkdir()
    for i in range(40):
        (d / f"good{i:02d}.txt").write_text(prose(i))
    (d / "html.html").write_text(f"<html><body><main><p>{prose(100)}</p></main></body></html>")
    (d / "twin.txt").write_text(prose(3).upper())
    (d / "short.txt").write_text("The page and the line.")
    (d / "blank.txt").write_text("  \n\n ")
    (d / "bare.html").write_text("<html><body><script>x</script></body></html>")
    (d / "deep.html").write_text("<div>" * 20_000 + prose(400))
    (d / "mail.txt").write_text(prose(200) + "\n\nwrite to me@host.org or phone (212) 555-1234")
    (d / "some.txt").write_text(prose(5).split("\n\n")[0] + "\n\n" + prose(300))
    (d / "most.txt").write_text(prose(6) + "\n\nThe end of it and more to read.")
    (d / "bad.txt").write_bytes(b"\0\0\0")
    (d / "cut.txt.gz").write_bytes(gzip.compress(prose(7).encode())[:-9])
    (d / "image.png").write_bytes(b"\x89PNG")
    lines = ["{oops", json.dumps({"text": prose(8000)}), json.dumps({"text": 3})]
    (d / "lines.jsonl").write_text("\n".join(lines))
    (d / "book.txt").write_text(prose(500, 240))
    return d


def run(corpus, out, **options) -> Funnel:
    return prepare(
        [str(corpus)], out, options=DataOptions(**options), cache=corpus.parent / "cache"
    )


def test_every_step_is_counted(corpus, tmp_path):
    funnel = run(corpus, tmp_path / "out", heldout_bytes=4000, max_words=250, near_duplicates=0)
    steps = {s["step"]: s for s in funnel.steps}
    assert {name: s["removed"] for name, s in steps.items() if s["removed"]} == {
        "gather": {"file: unsupported type": 1, "file: unreadable": 2, "line: malformed": 2},
        "extract": {"nested too deep": 1, "no text": 1},
        "exact duplicates": {"same text": 1},
        "quality rules": {"word_count": 1},
        "repeated paragraphs": {"paragraph": 11, "document mostly repeated": 1},
    }
    assert steps["scrub"]["replaced"] == {
        **dict.fromkeys(DEFAULT_KINDS, 0), "email": 1, "phone": 1,
    }  # fmt: skip
    counts = [
        steps[s]["documents"]
        for s in ("gather", "consent", "extract", "exact duplicates", "quality rules")
    ]
    assert counts == [50, 50, 49, 48, 47]
    assert steps["gather"]["unsupported_types"] == {".png": 1}
    assert steps["extract"]["cut"] == {"document cut": 1, "part produced": 2}
    assert steps["repeated paragraphs"]["documents"] == 46
    assert steps["train"]["documents"] + steps["heldout"]["documents"] == 46
    (unreadable,) = [m for m in funnel.unreadable if "bad.txt" in m]
    assert "binary" in unreadable
    assert Funnel.load(tmp_path / "out") == funnel
    train, heldout = (list(read_documents(tmp_path / "out" / n)) for n in ("train", "heldout"))
    assert len(train) == steps["train"]["documents"]
    assert sum(len(d.text.encode()) for d in heldout) == steps["heldout"]["bytes"] <= 4000
    assert steps["heldout"]["bytes"] > 2000
    everything = "\n".join(d.text for d in train + heldout)
    assert "<EMAIL_1> or phone <PHONE_1>" in everything
    assert "me@host" not in everything
    assert {d.id for d in train + heldout} > {"html.html", "good00.txt", "some.txt"}
    tally = funnel.sources[str(corpus)]
    assert {"book.txt:0", "book.txt:1", "lines.jsonl:2"} < {d.id for d in train + heldout}
    assert (tally["documents"], tally["files"]) == (46, 53)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "funnel.json",
        "heldout",
        "plan.json",
        "removed",
        "train",
        "units.json",
    ]


def test_names_and_fields_that_are_not_utf8_are_written(tmp_path):
    folder = tmp_path / os.fsdecode(b"gr\xfc\xdfe")
    folder.mkdir()
    odd = '{"text": %s, "url": "\\udce9", "meta": {"\\ud800": ["\\udfff"]}}\n'
    (folder / "a.jsonl").write_text(odd % json.dumps(prose(1)))
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text(prose(2))
    (folder / os.fsdecode(b"bad\xe9.txt")).write_bytes(b"\0")
    out = tmp_path / "out"
    funnel = prepare([str(folder)], out, options=DataOptions(heldout_bytes=0), cache=tmp_path)
    docs = list(read_documents(out / "train"))
    assert [d.id for d in docs] == ["a.jsonl:1", r"caf\xe9.txt"]
    assert docs[0].meta.items() >= {"url": "?", "?": ["?"]}.items()
    assert docs[0].source == f"{tmp_path}/gr\\xfc\\xdfe"
    assert list(funnel.sources) == [docs[0].source]
    assert funnel.unreadable[0].endswith("expected text, it holds binary data")
    assert Funnel.load(out) == funnel
    assert CliRunner().invoke(app, ["data", "show", str(out)]).exit_code == 0


def test_a_book_is_cut_and_nothing_of_it_is_lost(tmp_path):
    """Above Gopher's 100,000 words, without a blank line: users saw it vanish as "word_count"."""
    words = "the of and to in is that it was on ".split()
    rng = random.Random(0)
    text = " ".join(rng.choice(words) + "." * (i % 10 == 9) for i in range(250_000))
    (tmp_path / "novel.jsonl").write_text(json.dumps({"text": text}))
    out = tmp_path / "out"
    rules = DataOptions(heldout_bytes=0, rules=("word_count",))
    funnel = prepare([str(tmp_path / "novel.jsonl")], out, options=rules, cache=tmp_path)
    docs = list(read_documents(out / "train"))
    assert " ".join(d.text for d in docs) == text
    assert [d.id for d in docs] == [f"novel.jsonl:1:{i}" for i in range(3)]
    assert all(80_000 < len(d.text.split()) <= 100_000 for d in docs)
    assert all(d.text.endswith(".") for d in docs[:-1])
    assert funnel.steps[2]["cut"] == {"document cut": 1, "part produced": 3}


def test_no_paragraph_is_in_both_parts(corpus, tmp_path):
    run(corpus, tmp_path / "out", heldout_bytes=8000)
    parts = []
    for name in ("train", "heldout"):
        docs = read_documents(tmp_path / "out" / name)
        parts.append({p for d in docs for p in d.text.split("\n\n") if len(p) >= 80})
    assert parts[0] and parts[1]
    assert not parts[0] & parts[1]


def test_same_bytes_whatever_the_order_on_disk_and_the_workers(corpus, tmp_path, monkeypatch):
    other = tmp_path / "other" / "corpus"
    other.mkdir(parents=True)
    names = sorted(os.listdir(corpus), key=lambda n: n[::-1], reverse=True)
    for name in names:
        shutil.copy(corpus / name, other / name)
    results = []
    for folder, workers in ((corpus, 1), (other, 1), (corpus, 2)):
        monkeypatch.chdir(folder.parent)
        out = tmp_path / f"out{len(results)}"
        prepare(["corpus"], out, options=DataOptions(workers=workers), cache=tmp_path / "cache")
        results.append(contents(out))
    assert results[0] == results[1] == results[2]


def test_heldout_hardly_moves_when_text_is_added(corpus, tmp_path):
    def heldout(out):
        return {d.id for d in read_documents(out / "heldout")}

    run(corpus, tmp_path / "a", heldout_bytes=6000)
    (corpus / "new.txt").write_text(prose(999))
    run(corpus, tmp_path / "b", heldout_bytes=6000)
    assert len(heldout(tmp_path / "a")) >= 4
    assert len(heldout(tmp_path / "a") - heldout(tmp_path / "b")) <= 1


def test_options(corpus, tmp_path):
    assert run(corpus, tmp_path / "o", heldout_bytes=0).steps[-1]["documents"] == 0
    assert list(read_documents(tmp_path / "o" / "heldout")) == []
    plain = run(corpus, tmp_path / "p", scrub=(), rules=())
    assert "me@host.org" in "".join(d.text for d in read_documents(tmp_path / "p" / "train"))
    assert next(s for s in plain.steps if s["step"] == "quality rules")["removed"] == {}
    few = run(corpus, tmp_path / "q", max_bytes=3000)
    assert 3000 <= sum(s["bytes"] for s in few.sources.values()) < 6000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": ("nope",)}, "rules: expected some of"),
        ({"heldout_bytes": -1}, "heldout_bytes: expected 0"),
        ({"heldout_fraction": 0.9}, "heldout_fraction: expected"),
        ({"workers": 0}, "workers: expected 1"),
        ({"max_bytes": 0}, "max_bytes: expected 1"), ({"max_words": 0}, "max_words: expected 1"),
        ({"max_words": 100_001}, "max_words: expected at most 100,000, which the rule word_count"),
    ],
)  # fmt: skip
def test_bad_options(corpus, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_bad_explicit_file_is_refused_and_leaves_nothing(corpus, tmp_path):
    out = tmp_path / "out"
    for source, message in (
        (corpus / "bad.txt", "binary"), (corpus / "cut.txt.gz", "cut short"),
        (corpus / "nope.txt", "not found"),
        (corpus / "short.txt", "nothing is left after cleaning: .*word_count"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            run(source, out / "below")
        assert not out.exists()
    for sources in ([], "text"):
        with pytest.raises(InputError, match="sources: expected a list"):
            prepare(sources, out, cache=tmp_path)


def test_an_earlier_result_survives_a_failure(corpus, tmp_path):
    out = tmp_path / "out"
    run(corpus, out)
    before = contents(out)
    with pytest.raises(InputError):
        run(corpus / "bad.txt", out)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["00000.rows.jsonl.zst", "step.json", "funnel.json"])
def test_a_full_disk_stops_and_a_restart_finishes(corpus, tmp_path, name, monkeypatch):
    run(corpus, tmp_path / "expected")
    out, replace, full = tmp_path / "out", os.replace, [True]

    def refuse(source, target):
        if full[0] and os.path.basename(target) == name:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=r"out.*: cannot be written: No space left on device"):
        run(corpus, out)
    assert not (out / "funnel.json").exists()
    full[0] = False
    run(corpus, out)
    assert contents(out) == contents(tmp_path / "expected")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a corpus; its folder holds nothing else, hidden or not."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_read_only_folder_is_refused(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if os.geteuid() == 0:  # root may write anywhere, so simulate the kernel's refusal

        def refuse(self, *args, **kwargs):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(InputError, match="cannot be written: Permission denied"):
            run(corpus, out)
        monkeypatch.undo()
    else:
        out.mkdir()
        out.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(InputError, match="cannot be written: Permission denied"):
            run(corpus, out)
        out.chmod(stat.S_IRWXU)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        run(corpus, tmp_path / "file" / "out")


def test_read_documents_refuses_damaged_files(corpus, tmp_path):
    run(corpus, tmp_path / "out")
    p = tmp_path / "out" / "train" / "00000.jsonl.zst"
    data = p.read_bytes()
    for damaged in (data[:-20], data[:300] + bytes([data[300] ^ 1]) + data[301:], b'{"a": 1}\n'):
        p.write_bytes(damaged)
        with pytest.raises(InputError, match=r"00000\.jsonl\.zst"):
            list(read_documents(p))
    good = {"text": "x", "id": "1", "source": "s"}
    odd = [
        {**good, "text": "\ud800"},
        {**good, "meta": []},
        {**good, "id": 1},
        {"text": "x"},
        [good],
    ]
    for line in ["[" * 10**5, "\xff", *map(json.dumps, odd)]:
        p.write_bytes(line.encode("latin-1"))
        with pytest.raises(InputError, match="line 1: expected a prepared document"):
            list(read_documents(p))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_documents(tmp_path / "none.zst"))
    funnel = json.loads((tmp_path / "out" / "funnel.json").read_text())
    wrong = [{"steps": 3}, {"steps": [1]}, {"steps": [{"step": "gather"}]}, {"unreadable": [1]},
             {"sources": {"a": {"files": 1}}},
             {"steps": [{**funnel["steps"][0], "unsupported_types": 1}]},
             {"more": 1}]  # fmt: skip
    for text in ["[" * 10**5, "[]", *(json.dumps({**funnel, **change}) for change in wrong)]:
        (tmp_path / "out" / "funnel.json").write_text(text)
        with pytest.raises(InputError, match="expected the funnel"):
            Funnel.load(tmp_path / "out")
    with pytest.raises(InputError, match="expected the funnel"):
        Funnel.load(tmp_path)


def test_memory_is_bounded(tmp_path):
    """40 MB of JSON lines are processed one document at a time, and compress a thousandfold."""
    p = tmp_path / "big.jsonl"
    with open(p, "w") as f:
        for i in range(200):
            f.write(json.dumps({"text": (f"{i} " + "x" * 1000 + " ") * 200}) + "\n")
    one = tmp_path / "one.jsonl"  # what is imported and loaded once is not memory per document
    one.write_text(json.dumps({"text": prose(0)}) + "\n")
    options = DataOptions(rules=("word_count",))
    prepare([str(one)], tmp_path / "first", options=options, cache=tmp_path)
    tracemalloc.start()
    prepare([str(p)], tmp_path / "out", options=options, cache=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6 < p.stat().st_size


def test_command_line(corpus, tmp_path):
    out = tmp_path / "out"
    prepare_command = [
        "data",
        "prepare",
        str(corpus),
        "-o",
        str(out),
        "--cache",
        str(tmp_path / "c"),
    ]
    result = CliRunner().invoke(app, prepare_command, env={"COLUMNS": "240"})
    assert result.exit_code == 0, result.output
    assert " .csv " in CliRunner().invoke(app, ["data", "prepare", "--help"]).output
    show_result = CliRunner().invoke(app, ["data", "show", str(out)], env={"COLUMNS": "240"})
    assert show_result.exit_code == 0
    for text in (
        "quality rules",
        "1 word_count",
        "repeated paragraphs",
        "1 e-mail address replaced",
        "1 file: unsupported type (.png 1)",
        "2 lines: malformed",
        "lines.jsonl, line 1: expected one JSON object",
        "heldout",
    ):
        assert text in show_result.stdout
    assert show_result.stdout in result.output
    wrong = CliRunner().invoke(app, ["data", "get", "ftp:thing"])
    assert wrong.exit_code == 2 and "spec: expected model:NAME" in wrong.output
    rules = CliRunner().invoke(
        app, ["data", "prepare", str(corpus), "-o", str(out), "--rules", "word_count,nope"]
    )
    assert rules.exit_code == 2 and "rules: expected" in rules.output


def ignoring_ctrl_c(pid: int) -> list[bool]:
    """Whether each child of a process ignores SIGINT."""
    workers = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        (mask,) = re.findall(r"^SigIgn:\s*(\w+)", Path(f"/proc/{child}/status").read_text(), re.M)
        workers.append(bool(int(mask, 16) >> (signal.SIGINT - 1) & 1))
    return workers


def test_ctrl_c_ends_the_workers_too(tmp_path):
    """The terminal interrupts every process of the command: one line, no result, status 130."""
    for i in range(1200):  # about 4 s of work, longer than the sleep below
        (tmp_path / f"{i}.txt").write_text("\n\n".join(prose(i * 40 + k) for k in range(40)))
    fastlm = [sys.executable, "-P", "-m", "fastlm", "data", "prepare"]
    # a shell starts background jobs with the signal ignored, which a child would inherit
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = subprocess.Popen(
        [*fastlm, tmp_path, "-o", tmp_path / "out", "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    # until both workers, and multiprocessing's resource tracker, leave the signal to the parent:
    # one that is still starting would print Python's traceback
    while len(children := ignoring_ctrl_c(done.pid)) < 3 or not all(children):
        assert done.poll() is None, done.stderr and done.stderr.read()
        time.sleep(0.05)
    os.killpg(done.pid, signal.SIGINT)
    _, stderr = done.communicate(timeout=60)
    assert done.returncode == 130 and "Traceback" not in stderr, stderr
    assert stderr.splitlines()[-1].startswith("fastlm: interrupted")
    assert not (tmp_path / "out" / "train").exists()


def test_counts_have_the_right_plurals():
    from fastlm.data.stage import format_count

    assert [format_count(n, "file: hidden") for n in (1, 8884)] == [
        "1 file: hidden", "8,884 files: hidden",
    ]  # fmt: skip
    assert [format_count(n, "document left too short") for n in (1, 30)] == [
        "1 document left too short", "30 documents left too short",
    ]  # fmt: skip
    assert format_count(2, "part produced") == "2 parts produced"
    assert format_count(2, "line: malformed") == "2 lines: malformed"
    assert format_count(3, "same text") == "3 same text"


def test_a_source_name_that_is_not_utf8(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.txt")
    file.write_text(prose(1))
    out = tmp_path / os.fsdecode(b"gr\xfcn")
    result = CliRunner().invoke(
        app, ["data", "prepare", str(file), "-o", str(out), "--heldout-bytes", "0"]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    record = json.loads((out / "record.json").read_bytes().decode())["stages"]["."]
    assert record["options"]["sources"] == [rf"{tmp_path}/caf\xe9.txt"]
    (run_record,) = open_registry([out], update_index=False).records
    assert run_record.entry.options == record["options"]
    command = ["data", "show", str(out)]
    assert CliRunner().invoke(app, command).exit_code == 0
