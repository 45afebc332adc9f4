"""Forgetting: documents and conversations leave prepared text, shards, rows and the database, also
after a kill at any change of the disk, and the models that saw them are named.
"""

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_recipe
from corpus_layouts import LAYOUTS, pack, prepare_in, read_lines, set_layout
from typer.testing import CliRunner
from warc_records import wget_archive

from fastlm.cli import app
from fastlm.data.conversations import read_conversations
from fastlm.data.corpus import REMOVED, corpus_parts, part_name, read_documents, read_units
from fastlm.data.forget_log import (
    FORGET_LOG,
    document_key,
    forgotten_keys,
    read_forget_log,
    response_key,
    row_keys,
)  # fmt: skip
from fastlm.data.near_copies import NearCopies, is_signature
from fastlm.data.preferences import read_preferences
from fastlm.data.prepare import DataOptions, prepare
from fastlm.data.removals import read_removed
from fastlm.data.shards import INDEX, BatchSampler, TokenDataset
from fastlm.errors import InputError
from fastlm.feedback.build import FORMS, BuildOptions, build
from fastlm.feedback.forget import forget
from fastlm.pipeline.registry import PRESENT, open_registry
from fastlm.serve.feedback_store import Feedback, FeedbackStore, StoredResponse
from fastlm.stages import run_recipe

SMALL = ["pretrain.max_steps=2", "pretrain.validations=1", "pretrain.sample_at=[]"]


@pytest.fixture(scope="module", params=LAYOUTS)
def run_folder(request, tmp_path_factory):
    """A folder with a run of a small recipe, from text to a model. The text is in one file per
    split, or in parts.
    """
    folder = tmp_path_factory.mktemp("forget")
    recipe = tiny_recipe.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlm.data.prepare.prepare", prepare_in(request.param, prepare))
        run_recipe(recipe, folder / "runs/one", overrides=SMALL, until="pretrain")
        yield folder


@pytest.fixture
def runs(run_folder, tmp_path):
    shutil.copytree(run_folder / "runs", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def lost(runs):
    """The id of a document that was trained on, and its text."""
    document = next(read_documents(runs / "one/data", "train"))
    return document.id, document.text


def call(*arguments, status=0):
    result = CliRunner().invoke(app, ["data", "forget", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def texts(runs: Path, part: str = "train") -> list[str]:
    return [d.text for d in read_documents(runs / "one/data", part)]


def shards(runs: Path) -> list[str]:
    return sorted(p.name for p in (runs / "one/shards").rglob("*.*"))


def test_a_page_of_wget_is_forgotten_by_its_address(tmp_path):
    """GNU wget writes addresses in angle brackets; people don't."""
    url = "http://example.org/page"
    page = b"<p>" + b"A sentence of a page that a crawler has found. " * 20
    (tmp_path / "a.warc").write_bytes(wget_archive(url, page))
    (tmp_path / "b.txt").write_text("Another sentence that stays where it is. " * 20)
    options = ["--rules", "none", "--heldout-bytes", "0", "-o", tmp_path / "runs/one/data"]
    arguments = ["data", "prepare", tmp_path / "a.warc", tmp_path / "b.txt", *options]
    assert CliRunner().invoke(app, [str(a) for a in arguments]).exit_code == 0
    assert len(texts(tmp_path / "runs")) == 2
    call(tmp_path / "runs", "--target", url)
    (text,) = texts(tmp_path / "runs")
    assert text.startswith("Another sentence")


def test_a_document_leaves_text_and_shards(runs, lost, run_folder):
    id, text = lost
    before = texts(runs)
    dry = call(runs, "--target", id, "--dry-run", status=5)
    assert "would remove 1 document:" in dry.stdout and texts(runs) == before
    assert not (runs / FORGET_LOG).exists()
    result = call(runs, "--target", id, "--json", status=5)
    report = json.loads(result.stdout)
    assert [(r["kind"], r["count"]) for r in report["removed"]] == [
        ("document", 1), ("set of token shards", 1), ("set of token shards", 1),
    ]  # fmt: skip
    assert [m["name"] for m in report["models"]] == ["one/tokenizer", "one/pretrain"]
    assert report["quotes"] == [str(runs / "one/pretrain"), *(
        str(runs / f"one/{name}") for name in ("report.html", "summary.json")
    )]  # fmt: skip
    assert report["models"][1]["retrain_command"].endswith(f"--out {runs / 'one'}")
    assert texts(runs) == before[1:]
    assert not shards(runs)
    funnel = json.loads((runs / "one/data/funnel.json").read_text())
    steps = {step["step"]: step for step in funnel["steps"]}
    assert steps["train"]["documents"] == len(before) - 1
    assert steps["forgotten"]["removed"] == {"document": 1}
    # no record is out of date, no text is in the log
    states = {r.name: r.state for r in open_registry([runs]).records}
    assert set(states.values()) == {PRESENT}, states
    assert (
        text[:40] not in (runs / FORGET_LOG).read_text()
        and id not in (runs / FORGET_LOG).read_text()
    )
    repeated = json.loads(call(runs, "--target", id, "--json", status=5).stdout)
    assert repeated["removed"] == [] and repeated["models"] == report["models"]
    assert len(read_forget_log(runs)) == 1


def test_shards_of_text_that_an_earlier_call_cleaned(runs, lost, tmp_path):
    """Only the prepared text was named the first time; a moved copy has no record."""
    id, _ = lost
    moved = tmp_path / "moved"
    for name in ("data", "shards"):
        shutil.copytree(runs / "one" / name, moved / name)
    output = call(moved / "data", "--target", id, status=5).stdout
    assert f"not checked: {moved / 'shards'}: token shards beside the text" in output
    report = json.loads(call(moved, "--target", id, "--json", status=5).stdout)
    assert {line.rpartition(": ")[2] for line in report["unchecked"]} == {
        "no record tells whether it was made before documents were removed"
    }
    data = runs / "one/data"
    first = json.loads(call(data, "--target", id, "--json", status=5).stdout)
    assert [line.partition(":")[0] for line in first["unchecked"]] == [str(runs / "one/shards")]
    again = json.loads(call(data, "--target", id, "--json", status=5).stdout)
    assert again["unchecked"] == first["unchecked"] and not again["removed"]
    assert [r["kind"] for r in first["removed"]] == ["document"] and shards(runs)
    second = json.loads(call(runs, "--target", id, "--json", status=5).stdout)
    assert {r["kind"] for r in second["removed"]} == {"set of token shards"} and not shards(runs)


def test_it_does_not_come_back_and_the_training_runs_again(runs, lost, run_folder):
    id, text = lost
    call(runs, "--target", id, status=5)
    events = []
    recipe = run_folder / "tiny.toml"
    run_recipe(
        recipe, runs / "one", overrides=SMALL, until="pretrain",
        on_event=lambda e: events.append((e.get("stage"), e.get("state"))),
    )  # fmt: skip
    assert ("pretrain", "archived") in events and ("pretrain", "done") in events
    assert text not in [*texts(runs), *texts(runs, "heldout")]
    models = json.loads(call(runs, "--target", id, "--json", status=5).stdout)["models"]
    assert [m["name"] for m in models] == ["one/previous/tokenizer", "one/previous/pretrain"]
    shutil.rmtree(runs / "one/previous")  # the index still knows it
    deleted = json.loads(call(runs, "--target", id, "--json", status=0).stdout)["models"]
    assert {m["state"] for m in deleted} == {"deleted"} and "pretrain" in {
        m["kind"] for m in deleted
    }
    # and not into another run in the same folder
    run_recipe(recipe, runs / "new", until="data")
    new_texts = [d.text for d in read_documents(runs / "new/data", "train")]
    assert len(new_texts) > 15 and text not in new_texts


class Killed(BaseException):
    pass


def kill_at_every_change(monkeypatch, call, check) -> int:
    """Kill ``call(number)`` at its first change of the disk, then at its second, and so on. Call
    ``check(number, was_killed)`` after each. Return how often it was killed.
    """
    real, number = {name: getattr(os, name) for name in ("replace", "fsync", "unlink")}, 0
    for number in range(400):
        left = number

        def dying(name, *arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed(name)
            return real[name](*arguments, **options)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, lambda *a, n=name, **o: dying(n, *a, **o))
            try:
                call(number)
                was_killed = False
            except Killed:
                was_killed = True
        check(number, was_killed)
        if not was_killed:
            break
    return number


def test_killed_at_any_change_of_the_disk(runs, lost, tmp_path, monkeypatch):
    """The same command ends the work."""
    id, text = lost

    def start(number):
        shutil.copytree(runs, tmp_path / f"kill{number}")
        forget([tmp_path / f"kill{number}"], [id])

    def check(number, was_killed):
        folder = tmp_path / f"kill{number}"
        if was_killed:
            report = forget([folder], [id])
            assert [m["kind"] for m in report.models] == ["tokenizer", "pretrain"]
        assert not shards(folder) and text not in texts(folder)
        assert {r.state for r in open_registry([folder], update_index=False).records} == {PRESENT}
        parts = [p.name for p in folder.rglob(".*.fastlm-*")]
        assert not [name for name in parts if "jsonl" in name or ".bin" in name], parts
        shutil.rmtree(folder)

    assert kill_at_every_change(monkeypatch, start, check) > 10


def removal(id, text="", source="docs", url=None):
    return {"id": id, "source": source, "url": url, "step": "near duplicates", "reason": "copy",
            "detail": "b.txt", "text": text}  # fmt: skip


@pytest.fixture
def corpus_of_parts(tmp_path):
    """A corpus of parts with the records of removed documents. ``gone`` fills the first part."""
    out = tmp_path / "corpus"
    (out / REMOVED).mkdir(parents=True)
    documents = {
        "train": [("gone", f"Gone {i}. " * 9) for i in range(3)]
        + [("b", f"B {i}") for i in range(6)],
        "heldout": [("gone", "Gone and held out")],
    }
    steps = []
    for split, rows in documents.items():
        lines = [
            json.dumps({"text": text, "id": f"{number}.txt", "source": source, "meta": {}}) + "\n"
            for number, (source, text) in enumerate(rows)
        ]
        (out / f"{split}.jsonl.zst").write_bytes(pack([line.encode() for line in lines]))
        size = sum(len(text) for _, text in rows)
        steps.append({"step": split, "documents": len(rows), "bytes": size, "removed": {}})
    (out / "funnel.json").write_text(json.dumps({"steps": steps}))
    records = [
        [removal("x.html", source="gone"), removal("y.html", "Gone 1. Gone 1."), removal("z.html")],
        [removal("0.txt:4", source="gone"), removal("u.html", source="gone")],
    ]
    for number, rows in enumerate(records):
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        (out / REMOVED / part_name(number)).write_bytes(pack(lines))
    return set_layout(out, "parts")


def test_killed_while_it_empties_parts(corpus_of_parts, tmp_path, monkeypatch):
    """Emptied parts are deleted, units.json and the funnel follow, and the records of removed
    documents go: of the document itself, of its source, and of a copy of its text.
    """
    before = read_units(corpus_of_parts)

    def start(number):
        shutil.copytree(corpus_of_parts, tmp_path / f"kill{number}")
        forget([tmp_path / f"kill{number}"], ["gone"])

    def check(number, was_killed):
        target = tmp_path / f"kill{number}"
        if was_killed:
            forget([target], ["gone"])
        assert [d.source for d in read_documents(target, "train")] == ["b"] * 6
        assert list(read_documents(target, "heldout")) == []
        assert not (target / "train/00000.jsonl.zst").exists()
        assert read_units(target) == before[1:3], number
        steps = {s["step"]: s for s in json.loads((target / "funnel.json").read_text())["steps"]}
        assert [steps[name]["documents"] for name in ("train", "heldout", "forgotten")] == [6, 0, 6]
        assert steps["forgotten"]["removed"] == {"document": 4}
        (part,) = (target / REMOVED).iterdir()
        assert [json.loads(line)["id"] for line in read_lines([part])] == ["z.html"]
        assert not list(target.rglob(".*"))

    assert kill_at_every_change(monkeypatch, start, check) > 15


def test_another_call_does_not_complete_a_killed_one(corpus_of_parts, monkeypatch):
    """A part that is missing may be one that a killed call deleted, or damage."""
    (corpus_of_parts / "train/00000.jsonl.zst").unlink()
    with pytest.raises(InputError, match=r"train/00000\.jsonl\.zst: .*the folder does not"):
        forget([corpus_of_parts], ["b"])


def test_an_unfinished_build_is_not_searched(corpus_of_parts):
    """Its units must stay as their markers say."""
    unit = corpus_of_parts / "work/read/00000.rows.jsonl.zst"
    unit.parent.mkdir(parents=True)
    unit.write_bytes(pack([json.dumps(removal("x.txt", "B 1", "b")).encode() + b"\n"]))
    (corpus_of_parts / "work/plan.json").write_text("{}")
    before = unit.read_bytes()
    report = forget([corpus_of_parts], ["b"])
    assert [r["kind"] for r in report.removed] == ["document"] and report.is_incomplete
    (message,) = report.unchecked
    assert message.startswith(f"{corpus_of_parts}/work: an unfinished build may have it")
    assert unit.read_bytes() == before


def test_a_document_that_was_already_removed(corpus_of_parts):
    """Its record goes, and later builds leave the document out."""
    path = corpus_of_parts / REMOVED / part_name(0)
    record = removal("page", "A page", "deb:x", "http://a.example/page")
    path.write_bytes(pack([json.dumps(record).encode() + b"\n"]))
    before = [p.read_bytes() for p in sorted(corpus_of_parts.rglob("[th]*/*.zst"))]
    report = forget([corpus_of_parts], ["http://a.example/page"])
    assert [(r["kind"], r["count"]) for r in report.removed] == [
        ("record of a removed document", 1)
    ]
    assert report.sources == ["deb:x: page"] and not report.is_incomplete
    assert not path.exists()
    assert [p.read_bytes() for p in sorted(corpus_of_parts.rglob("[th]*/*.zst"))] == before
    assert document_key("deb:x", "page") in forgotten_keys([corpus_of_parts])
    path.write_bytes(pack([b'{"id": 1}\n']))
    with pytest.raises(InputError, match=r"removed/00000\.jsonl\.zst, line 1"):
        forget([corpus_of_parts], ["b"])


def test_by_the_hash_of_a_text_and_without_prepared_text(runs, lost):
    id, text = lost
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert len(forget([runs], [digest], dry_run=True).removed) == 3
    shutil.rmtree(runs / "one/data")
    assert "found nothing of" in call(runs, "--target", id, status=2).stderr
    report = forget([runs], [digest])
    assert not report.removed and report.is_incomplete and shards(runs)
    assert [line.partition(": ")[2] for line in report.unchecked] == [
        "its prepared text is not here, so that its documents are unknown"
    ] * 2


def test_all_documents_of_a_source(runs, lost):
    source = json.loads((runs / "one/data/funnel.json").read_text())["sources"]
    report = forget([runs], list(source))
    assert not texts(runs) and not texts(runs, "heldout") and report.is_incomplete
    with pytest.raises(InputError, match="expected a folder of token shards"):
        TokenDataset(runs / "one/shards/train")
    assert not list((runs / "one/shards").rglob("*.bin"))


def test_a_training_notices(runs, lost):
    id, _ = lost
    sampler = BatchSampler(TokenDataset(runs / "one/shards/train"), 2, 16, seed=0)
    sampler.next_batch()
    index = runs / "one/shards/train/index.json"
    os.utime(index, ns=(1, 1))  # touched, not changed
    sampler.next_batch()
    state = sampler.state_dict()
    forget([runs], [id])
    with pytest.raises(InputError, match="they have changed"):
        sampler.next_batch()
    assert state["data"] and not (runs / "one/shards/train" / INDEX).exists()


def test_paragraphs_that_stand_elsewhere(tmp_path):
    shared = "This paragraph stands in two documents. " * 4
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text(f"{shared}\n\nOnly in a.")
    (docs / "b.txt").write_text(f"{'Before it, quite other words. ' * 20}\n\n{shared}")
    options = DataOptions(rules=(), min_paragraph=10**6, heldout_bytes=0)
    prepare([str(docs)], tmp_path / "corpus", options=options, cache=tmp_path)
    report = forget([tmp_path / "corpus"], [str(docs / "a.txt")])
    assert [(e["id"], e["paragraphs"]) for e in report.elsewhere] == [("b.txt", 1)]
    assert not report.is_incomplete and report.sources == [f"{docs}: a.txt"]
    left = [d.id for d in read_documents(tmp_path / "corpus", "train")]
    assert left == ["b.txt"]


def near_corpus(folder: Path, near_duplicates: float = 0) -> tuple[Path, Path]:
    """Prepare a page, a copy of it with one edit and another page; return (texts, corpus)."""
    docs = folder / "docs"
    docs.mkdir()
    page = " ".join(f"word{i * i % 97}a{i}" for i in range(120))
    (docs / "a.txt").write_text(page)
    (docs / "copy.txt").write_text(page.replace("word1a1", "edited"))
    (docs / "other.txt").write_text(" ".join(f"other{i}" for i in range(120)))
    options = DataOptions(
        rules=(), min_paragraph=10**6, heldout_bytes=0, near_duplicates=near_duplicates
    )
    prepare([str(docs)], folder / "corpus", options=options, cache=folder)
    return docs, folder / "corpus"


def ids(corpus: Path) -> list[str]:
    return sorted(Path(d.id).name for d in read_documents(corpus, "train"))


def test_near_copies_go_with_the_document(tmp_path):
    docs, corpus = near_corpus(tmp_path)
    before = ids(corpus)
    result = call(corpus, "--target", docs / "a.txt", "--near", "--dry-run")
    assert "near copy (0.9" in result.output and "copy.txt" in result.output
    assert ids(corpus) == before
    result = call(corpus, "--target", docs / "a.txt", "--near", "--json")
    report = json.loads(result.output)
    (copy,) = report["near_copies"]
    assert copy["id"] == "copy.txt" and 0.9 < copy["similarity"] < 1
    assert ids(corpus) == ["other.txt"] and report["removed"][0]["count"] == 2
    # later builds: the copy by its key, other copies by the signature of the page
    log = read_forget_log(corpus)
    assert len(log) == 1 and document_key(str(docs), "a.txt") in log[0].keys
    page = (docs / "a.txt").read_text()
    copies = NearCopies(signatures=filter(is_signature, forgotten_keys([corpus])))
    assert all(copies.similarities([page, page.replace("word4a2", "edited again")]))
    assert not any(copies.similarities([(docs / "other.txt").read_text()]))
    assert page[:20] not in (corpus / FORGET_LOG).read_text()
    # a corpus that is prepared from elsewhere: by the signature in the log alone
    (docs / "a.txt").unlink()
    shutil.copy(corpus / FORGET_LOG, tmp_path / FORGET_LOG)
    prepare(
        [str(docs)], tmp_path / "second", cache=tmp_path,
        options=DataOptions(rules=(), min_paragraph=10**6, heldout_bytes=0, near_duplicates=0),
    )  # fmt: skip
    assert ids(tmp_path / "second") == ["copy.txt", "other.txt"]
    forget([tmp_path], [str(docs / "a.txt")], near=True)
    assert ids(tmp_path / "second") == ["other.txt"]
    (docs / "copy.txt").rename(docs / "renamed.txt")
    (docs / "renamed.txt").write_text(page.replace("word16a4", "another edit"))
    funnel = prepare(
        [str(docs)], tmp_path / "third", cache=tmp_path, forgotten=forgotten_keys([tmp_path]),
        options=DataOptions(rules=(), min_paragraph=10**6, heldout_bytes=0, near_duplicates=0),
    )  # fmt: skip
    assert ids(tmp_path / "third") == ["other.txt"]
    removed = {reason: n for step in funnel.steps for reason, n in step["removed"].items()}
    assert removed == {"near copy of a forgotten text": 1}


def test_without_near_a_copy_stays(tmp_path):
    docs, corpus = near_corpus(tmp_path)
    report = forget([corpus], [str(docs / "a.txt")])
    assert ids(corpus) == ["copy.txt", "other.txt"] and not report.near_copies
    assert not any(map(is_signature, forgotten_keys([corpus])))


def test_near_copies_of_a_file_that_is_in_no_corpus(tmp_path):
    docs, corpus = near_corpus(tmp_path)
    text = (docs / "a.txt").read_text().replace("word9a3", "edited elsewhere")
    (tmp_path / "mine.txt").write_text(text)
    report = forget([corpus], [str(tmp_path / "mine.txt")], near=True)
    assert ids(corpus) == ["other.txt"] and len(report.near_copies) == 2
    assert not report.not_found


@pytest.mark.parametrize("near_duplicates", [0, 0.8], ids=["same text", "near duplicate"])
def test_what_remains_in_place_of_a_removed_copy(tmp_path, near_duplicates):
    """The text of a document that a build removed is not there; its record names the copy."""
    docs, corpus = near_corpus(tmp_path, near_duplicates)
    (docs / "same.txt").write_text((docs / "a.txt").read_text().upper())
    options = DataOptions(
        rules=(), min_paragraph=10**6, heldout_bytes=0, near_duplicates=near_duplicates
    )
    shutil.rmtree(corpus)
    prepare([str(docs)], corpus, options=options, cache=tmp_path)
    target = "copy.txt" if near_duplicates else "same.txt"
    (docs / target).unlink()
    assert "a.txt" in ids(corpus) and target not in ids(corpus)
    report = forget([corpus], [target], near=True)
    assert [c["id"] for c in report.near_copies] == ["a.txt"]
    assert "a.txt" not in ids(corpus) and "other.txt" in ids(corpus)


@pytest.mark.parametrize("near", [False, True])
def test_records_of_copies_of_the_target(tmp_path, near):
    """A build removed near.txt as a copy of a.txt, and same.txt as one of near.txt; the records
    quote both.
    """
    docs, corpus = near_corpus(tmp_path)
    shutil.rmtree(corpus)
    page = (docs / "a.txt").read_text()
    (docs / "copy.txt").rename(docs / "near.txt")
    (docs / "near.txt").write_text(page.rsplit(" ", 1)[0])  # shorter, so that a.txt remains
    (docs / "same.txt").write_text((docs / "near.txt").read_text().upper())
    options = DataOptions(rules=(), min_paragraph=10**6, heldout_bytes=0)
    prepare([str(docs)], corpus, options=options, cache=tmp_path)
    assert sorted(r["id"] for r in read_removed(corpus)) == ["near.txt", "same.txt"]
    forget([corpus], [str(docs / "a.txt")], near=near)
    assert ids(corpus) == ["other.txt"]
    left = [r["id"] for r in read_removed(corpus)]
    # without --near: near.txt only, whose excerpt is the beginning of the page, too
    assert left == ([] if near else ["same.txt"])
    prepare(
        [str(docs)], corpus, options=options, cache=tmp_path, forgotten=forgotten_keys([corpus])
    )
    assert ("near.txt" in ids(corpus)) is not near


def test_killed_while_it_removes_near_copies(tmp_path, monkeypatch):
    docs, corpus = near_corpus(tmp_path)

    def start(number):
        shutil.copytree(corpus, tmp_path / f"kill{number}")
        forget([tmp_path / f"kill{number}"], [str(docs / "a.txt")], near=True)

    def check(number, was_killed):
        target = tmp_path / f"kill{number}"
        if was_killed:
            forget([target], [str(docs / "a.txt")], near=True)
        assert ids(target) == ["other.txt"]
        assert sum(map(is_signature, forgotten_keys([target]))) == 1

    assert kill_at_every_change(monkeypatch, start, check) > 3


def talk(text):
    return [{"role": "user", "content": text}]


def message_contents(*answers):
    return [[{"role": "assistant", "content": answer}] for answer in answers]


def filled(location):
    store = FeedbackStore(location)
    store.add_response(
        StoredResponse(
            "r1",
            "m",
            talk("Secret one?"),
            message_contents("Better one", "Worse one"),
            None,
            "talk",
        )
    )
    store.add_response(
        StoredResponse("r2", "m", talk("Open two?"), message_contents("Better two", "Worse two"))
    )
    for id in ("r1", "r2"):
        store.add(Feedback(id, preferred_over=((id, 1),), rater="ann"))
        store.add(Feedback(id, thumb="up", rater="ann"))
        store.add(Feedback(id, choice=1, corrected=f"Fixed {id}", rater="bob"))
    return store


def build_rows(base, out):
    build(
        [str(base)], out, options=BuildOptions(judge=0.0, test=0.0, max_rater_share=1.0), cache=out
    )


def test_withdrawn_consent_reaches_what_was_exported(tmp_path):
    base, rows = tmp_path / "f.sqlite", tmp_path / "built/train"
    with filled(base) as store:
        build_rows(base, tmp_path / "built")
        # of a fastlm that wrote no provenance, compressed
        old = [json.loads(line) for line in (rows / "preferences.jsonl").read_text().splitlines()]
        for row in old:
            assert row_keys(row) > {response_key(row.pop("provenance")["responses"][0])} or True
        with gzip.open(rows / "old.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in old)
        before = {p.name: len(list(lines(p))) for p in rows.iterdir()}
        assert before["sft.jsonl"] == 2 and before["old.jsonl.gz"] == 4
        conversations = list(read_conversations([str(rows / "sft.jsonl")], cache=tmp_path))
        assert "provenance" not in conversations[0].to_row()
        assert store.forget("talk") == 4
        assert not store.add_response(
            StoredResponse("r1", "m", talk("Secret one?"), message_contents("x"))
        )
        assert not store.add_response(
            StoredResponse("r9", "m", talk("Secret?"), message_contents("x"), None, "talk")
        )
        build_rows(base, tmp_path / "new")
        for form in FORMS:
            assert "one" not in (tmp_path / f"new/train/{form}.jsonl").read_text().lower()
    stored = b"".join(p.read_bytes() for p in tmp_path.glob("f.sqlite*"))
    assert b"Secret" not in stored and b"Fixed r1" not in stored
    arguments = [rows, "--withdrawn", "--feedback", base]
    assert "would remove" in call(*arguments, "--dry-run").stdout
    report = json.loads(call(*arguments, "--json").stdout)
    assert sorted((Path(r["path"]).name, r["count"]) for r in report["removed"]) == [
        ("kto.jsonl", 3), ("old.jsonl.gz", 2), ("preferences.jsonl", 2), ("prompts.jsonl", 1),
        ("sft.jsonl", 1),
    ]  # fmt: skip
    for path in rows.iterdir():
        if path.name != FORGET_LOG:
            assert all("one" not in str(line).lower() for line in lines(path)), path
            assert len(list(lines(path))) == before[path.name] // 2
    assert len(list(read_preferences([str(rows / "kto.jsonl")], cache=tmp_path))) == 3
    assert len(list(read_preferences([str(rows / "old.jsonl.gz")], cache=tmp_path))) == 2
    assert "nothing to remove" in call(*arguments).stdout
    # by its id: database and rows in one step
    done = call(rows, "--target", "r2", "--feedback", base)
    assert "removed 1 responses or conversations" in done.stdout
    assert not list(lines(rows / "sft.jsonl"))
    with FeedbackStore(base) as store:
        assert not store.responses() and response_key("r2") in store.withdrawn_keys()


def lines(path: Path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        yield from map(json.loads, file)


def test_a_model_that_learned_withdrawn_rows_is_named(tmp_path, run_folder, runs):
    rows = runs / "sft.jsonl"
    with filled(tmp_path / "f.sqlite") as store:
        build_rows(tmp_path / "f.sqlite", tmp_path / "built")
        shutil.copy(tmp_path / "built/train/sft.jsonl", rows)
        arguments = ["sft", rows, "--model", runs / "one", "-o", runs / "tuned", "--heldout", "0"]
        arguments += ["--max-steps", "1", "--chat-template", run_folder / "template.jinja"]
        (run_folder / "template.jinja").write_text(
            "{% for m in messages %}{{ m['content'] }}"
            "{{ '<|endoftext|>' if m['role'] == 'assistant' }}{% endfor %}"
        )
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, (result.output, result.exception)
        store.forget("r1")
        report = forget([runs], keys=store.withdrawn_keys())
    assert [m["name"] for m in report.models] == ["tuned"] and report.is_incomplete
    assert report.models[0]["retrain_command"].startswith("fastlm")  # and the words of this process


def test_bad_input(runs, tmp_path):
    for arguments, message in (
        ([runs], "expected --target"),
        ([runs, "--withdrawn"], "expected --feedback"),
        ([tmp_path / "none", "--target", "x"], "got nothing"),
        ([runs, "--target", " "], "got an empty text"),
        ([runs, "--target", "x", "--feedback", tmp_path / "f.sqlite"], "not found"),
        ([runs, "--list", tmp_path / "list"], "expected a readable text file"),
        ([runs, "--target", "no such"], "found nothing of 'no such'"),
    ):
        assert message in call(*arguments, status=2).stderr
    (tmp_path / "list").write_text("00.txt\n\n01.txt\nno such\n")
    before = shards(runs)
    (heldout,) = corpus_parts(runs / "one/data", "heldout")[:1]
    content = heldout.read_bytes()
    heldout.write_bytes(b"damaged")
    assert "heldout" in call(runs, "--target", "02.txt", status=2).stderr
    assert before and shards(runs) == before
    heldout.write_bytes(content)
    report = json.loads(call(runs, "--list", tmp_path / "list", "--json", status=5).stdout)
    assert report["not_found"] == ["no such"]


def test_a_run_at_work_is_left_alone(runs, lost):
    from fastlm.pipeline.run import locked

    before = shards(runs)
    with locked(runs / "one"):
        message = call(runs, "--target", lost[0], status=2).stderr
    assert "another fastlm run is at work" in message and before and shards(runs) == before
