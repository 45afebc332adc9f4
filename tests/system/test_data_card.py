"""The card of a corpus, and the records of removed documents."""

import json
import random
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
import zstandard
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data import corpus_facts
from fastlm.data.corpus import CARD_FILES, read_documents
from fastlm.data.data_card import card_sections, render_markdown, render_page
from fastlm.data.prepare import DataOptions, prepare
from fastlm.data.stage import funnel_values
from fastlm.pipeline.funnel import Funnel
from fastlm.pipeline.provenance import artifact_id
from fastlm.pipeline.stage import ReportSection
from fastlm.pipeline.templates import page_environment
from fastlm.sources.input_digest import InputDigest

WORDS = "harbour lantern meadow winter copper violin orchard sentence engine market".split()
HOSTILE = 'a"><script>alert(1)</script>|](http://x.example)`*\x1b[31m\u202e'


def prose(seed: int, words: int = 120) -> str:
    draw = random.Random(seed)
    return "The start of it and the end. " + " ".join(
        f"{draw.choice(WORDS)}{draw.randint(0, 999)} of the" for _ in range(words // 3)
    )


def call(*arguments, status: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Return a corpus with a copy, a near copy, short texts, and pages that may not be used."""
    folder = tmp_path_factory.mktemp("built")
    texts = [prose(i) for i in range(30)]
    near = texts[3].replace("start", "middle", 1)
    texts += [texts[0], near, "too short", "short, too", prose(50) + " write to me@host.org"]
    rows = [
        {"text": text, "id": f"n{i}", "url": f"https://s{i % 3}.example/{i}"}
        for i, text in enumerate(texts)
    ]  # fmt: skip
    source = folder / "pages.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opt_out = folder / "no.txt"
    opt_out.write_text("url: https://s1.example/4\n")
    call("data", "prepare", source, "-o", folder / "out", "--opt-out", opt_out,
         "--heldout-bytes", 3000)  # fmt: skip
    return folder / "out"


@pytest.fixture
def corpus(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "out")


def add_metadata(corpus: Path, meta: dict) -> None:
    """Add metadata to each document of the training part."""
    for path in (corpus / "train").iterdir():
        stream = zstandard.ZstdDecompressor().stream_reader(path.read_bytes())
        lines = stream.read().decode().splitlines()
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["meta"] |= meta
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(zstandard.compress(text.encode()))


class Elements(HTMLParser):
    """The elements of a page, and the text of its cells."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        assert not dict(attrs).get("src"), "self-contained"

    def handle_data(self, data):
        self.texts.append(data)


# fastlm data show --dropped, --id, --url


def records(corpus, *arguments) -> list[dict]:
    output = call("data", "show", corpus, *arguments, "--json").stdout
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.parametrize(
    "rule, reasons",
    [
        ("near duplicate", {"near duplicate": 1}),
        ("Near-Dup", {"near duplicate": 1}),
        ("word_count", {"word_count": 2}),
        ("word", {"word_count": 2}),
        ("quality rules", {"word_count": 2}),
        ("consent", {"opt-out": 1}),
        ("consent: opt", {"opt-out": 1}),
        ("exact", {"same text": 1}),
    ],
)
def test_a_rule_is_a_step_or_a_reason_or_its_beginning(built, rule, reasons):
    rows = records(built, "--dropped", rule)
    assert {row["reason"]: sum(r["reason"] == row["reason"] for r in rows) for row in rows} == (
        reasons
    )
    assert all(row["id"] and row["source"].endswith("pages.jsonl") for row in rows)


def test_every_removal_has_a_reason_that_can_be_looked_up(built):
    """Each document of the input is in a part, or in exactly one record."""
    rest = {d.id for split in ("train", "heldout") for d in read_documents(built, split)}
    removed = [i for i in range(1, 36) if f"pages.jsonl:{i}" not in rest]
    assert len(removed) == 5
    for i in removed:
        (row,) = records(built, "--id", f"pages.jsonl:{i}")
        assert row["detail"] or row["text"]
        assert records(built, "--url", f"https://s{(i - 1) % 3}.example/{i - 1}") == [row]


def test_a_document_that_was_not_removed_is_named_with_its_part(built):
    document = next(read_documents(built, "train"))
    result = call("data", "show", built, "--id", document.id)
    first, *facts = result.stdout.splitlines()
    assert first == f"{document.id}: not removed, it is in {built}/train/00000.jsonl.zst"
    assert dict(line.split(None, 1) for line in facts) == {
        name: str(value) for name, value in {"source": document.source, **document.meta}.items()
    }
    error = call("data", "show", built, "--url", "https://no.example/", status=2).stderr
    assert "url: expected a document that" in error and "got https://no.example/" in error
    assert records(built, "--dropped", "word", "--id", document.id) == []


def test_an_unknown_rule_names_the_reasons_that_there_are(built):
    for rule in ("sentiment", "duplicate near", ""):
        error = " ".join(call("data", "show", built, "--dropped", rule, status=2).stderr.split())
        assert "dropped: expected a step or the reason of a removal" in error
        for text in ("consent: opt-out 1", "exact duplicates: same text 1", "word_count 2"):
            assert text in error


def test_a_step_that_removed_no_documents_says_so(built):
    for rule in ("repeated paragraphs", "heldout"):
        output = call("data", "show", built, "--dropped", rule).stdout
        assert output == f"{rule}: no documents were removed\n"


def test_piped_records_are_plain_and_complete(built):
    output = call("data", "show", built, "--dropped", "word_count").stdout
    assert output.count("quality rules: word_count\n") == 2
    assert "  text    too short\n" in output and "  text    short, too\n" in output
    assert "\x1b" not in output
    near = call("data", "show", built, "--dropped", "near").stdout
    assert re.search(r"detail  0\.9\d\d like .+ pages.jsonl:\d+\n", near), near


def test_texts_cannot_control_the_terminal(corpus):
    record = {"id": HOSTILE, "source": "s", "url": None, "step": "quality rules",
              "reason": "word_count", "detail": HOSTILE, "text": HOSTILE}  # fmt: skip
    part = corpus / "removed/00000.jsonl.zst"
    part.write_bytes(zstandard.compress(json.dumps(record).encode() + b"\n"))
    output = call("data", "show", corpus, "--dropped", "word_count").stdout
    assert "<script>" in output and not {"\x1b", "\u202e"} & set(output)
    from fastlm.data.removals import read_removed, styled_text

    styled = re.sub(r"\x1b\[[\d;]*m", "", styled_text(next(read_removed(corpus)), 60))
    assert not {"\x1b", "\u202e"} & set(styled)
    assert max(map(len, styled.splitlines())) <= 60


def test_a_corpus_without_records_says_so(corpus):
    shutil.rmtree(corpus / "removed")
    error = call("data", "show", corpus, "--dropped", "word_count", status=2).stderr
    assert "expected the records of removed documents" in " ".join(error.split())
    assert "near duplicates" in call("data", "show", corpus).stdout, "the funnel is still shown"
    assert json.loads(call("data", "show", corpus, "--json").stdout)["steps"]


# fastlm data card


def test_the_card_says_what_the_corpus_is(corpus):
    output = call("data", "card", corpus, "--license", "mit").stdout
    assert output.split() == [str(corpus / name) for name in CARD_FILES]
    facts = json.loads((corpus / "card.json").read_text())
    funnel = Funnel.load(corpus)
    assert facts["funnel"] == funnel.steps
    count = sum(split["documents"] for split in facts["splits"].values())
    assert count == facts["scanned_documents"] == 30
    assert sum(row["documents"] for row in facts["lengths"]) == count
    assert sorted(row["name"] for row in facts["sites"]) == [f"s{i}.example" for i in range(3)]
    assert facts["personal_data"]["email"] == 1
    assert facts["clusters"] == [{"size": 1, "documents": 29}, {"size": 2, "documents": 1}]
    reasons = {row["reason"]: row for row in facts["removed"]}
    assert {"opt-out", "same text", "near duplicate", "word_count"} <= reasons.keys()
    assert {e["text"] for e in reasons["word_count"]["examples"]} == {"too short", "short, too"}
    assert facts["plan"]["options"]["heldout_bytes"] == 3000
    assert len(facts["plan"]["sha256"]) == len(facts["build"]["ids"]["corpus"]) == 64

    front, body = (corpus / "card.md").read_text().split("---\n", 2)[1:]
    front = yaml.safe_load(front)
    assert front["license"] == "mit" and front["size_categories"] == ["n<1K"]
    assert front["language"] == ["en"] and front["task_categories"] == ["text-generation"]
    assert [f["split"] for f in front["configs"][0]["data_files"]] == ["train", "heldout"]
    for text in ("| quality rules<br>word\\_count | 2 |", "“too short …”", "data prepare",
                 "## What is not decided", "no legal advice", "heldout\\_bytes"):  # fmt: skip
        assert text in body, text
    page = Elements((corpus / "card.html").read_text())
    assert "script" not in page.tags and "svg" in page.tags
    assert "near duplicate" in page.texts and any("too short" in t for t in page.texts)
    assert {"30", "clean text", "What is not decided"} <= set(page.texts)


def test_each_table_of_the_markdown_is_well_formed(corpus):
    call("data", "card", corpus)
    lines = (corpus / "card.md").read_text().splitlines()
    widths = []
    for before, line in pairwise(lines):
        columns = len(re.findall(r"(?<!\\)\|", line))
        if line.startswith("|") and before.startswith("|"):
            assert columns == widths[-1], (before, line)
        widths.append(columns)


def test_values_from_outside_are_escaped(corpus):
    add_metadata(corpus, {
        "language": HOSTILE, "licence": HOSTILE, "consent": HOSTILE, "consent_rule": HOSTILE,
        "url": "https://<script>.example/", "cluster": HOSTILE, "cluster_size": 7,
    })  # fmt: skip
    funnel = json.loads((corpus / "funnel.json").read_text())
    funnel["sources"] = {HOSTILE: {"files": 1, "documents": 3, "bytes": 9}}
    funnel["unreadable"], funnel["warnings"] = [HOSTILE], [HOSTILE]
    funnel["steps"][4]["removed"][HOSTILE] = 2
    (corpus / "funnel.json").write_text(json.dumps(funnel))
    record = {"id": HOSTILE, "source": HOSTILE, "url": HOSTILE, "step": funnel["steps"][4]["step"],
              "reason": HOSTILE, "detail": HOSTILE, "text": HOSTILE}  # fmt: skip
    part = corpus / "removed/00000.jsonl.zst"
    part.write_bytes(zstandard.compress(json.dumps(record).encode() + b"\n"))
    call("data", "card", corpus)
    text = (corpus / "card.md").read_text()
    body = text.split("---\n", 2)[2]
    assert "script" in body and "\x1b" not in text and "\u202e" not in text
    assert not re.search(r"(?<!\\)<(?!br>)", body), "only our own <br>"
    assert not re.search(r"(?<!\\)\]\(", body), "no link"
    assert yaml.safe_load(text.split("---\n", 2)[1])["task_categories"]
    page = (corpus / "card.html").read_text()
    assert not {"script", "img", "a"} & set(Elements(page).tags)
    assert "\x1b" not in page and "\u202e" not in page


def test_the_report_of_a_run_names_warnings_and_a_few_endings():
    types = {f".e{i}": 30 - i for i in range(20)}
    step = {"step": "gather", "documents": 1, "bytes": 9, "unsupported_types": types,
            "removed": {"file: unsupported type": sum(types.values())}}  # fmt: skip
    funnel = Funnel([step], {HOSTILE: {"files": 2, "documents": 1, "bytes": 9}}, warnings=[HOSTILE])
    part = ReportSection("t", "n", template="data.html.jinja", values=funnel_values(funnel))
    page = page_environment().get_template("data.html.jinja").render(part=part)
    elements = Elements(page)
    assert "script" not in elements.tags
    assert f"Warning: {HOSTILE}" in elements.texts
    (why,) = (text for text in elements.texts if "unsupported type" in text)
    assert ".e7 23, 12 other endings" in why and ".e8" not in why


def test_scores_and_the_mix_are_shown_where_they_are_recorded(corpus):
    call("data", "card", corpus)
    assert "Quality and toxicity: not recorded" in (corpus / "card.md").read_text()
    add_metadata(corpus, {"quality_bucket": 19, "toxicity": 0.25, "consent": "yes",
                          "consent_rule": "train-ai=y [header Content-Usage]",
                          "date": "2024-02-03T00:00:00Z", "license": "MIT"})  # fmt: skip
    facts = corpus_facts.corpus_facts(corpus)
    train = facts["splits"]["train"]["documents"]
    assert facts["quality_buckets"] == [0] * 19 + [train]
    assert facts["toxicity"] == [0, 0, train, *[0] * 7]
    assert [(row["name"], row["documents"]) for row in facts["years"]] == [("2024", train)]
    assert [(row["name"], row["documents"]) for row in facts["licences"]] == [("MIT", train)]
    assert facts["consent"]["rules"][0]["name"] == "train-ai=y"
    counts = {"documents": 2, "bytes": 100, "share": 0.25, "train_documents": 3,
              "train_bytes": 150, "train_share": 1.0, "epochs": 1.5}  # fmt: skip
    facts["mix"] = {"languages": {"en": {"weight": 1.5, **counts}},
                    "sources": {"a|b": {"weight": 0.5, **counts}}}  # fmt: skip
    facts["plan"]["options"]["mix"] = {"max_epochs": 4.0}
    sections = card_sections(facts)
    text = render_markdown(facts, sections)
    for line in ("- at most: 4 epochs", "| en | 1.5 |", "| 19 |",
                 "| a\\|b | 0.5 | 100 bytes | 25.0% | 1.50 | 150 bytes | 100.0% |",
                 "train\\-ai=y"):  # fmt: skip
        assert line in text, line
    assert render_page(facts, sections).count("<svg") == 3


def test_values_of_other_types_count_as_not_recorded(corpus):
    meta = {"language": 7, "licence": ["x"], "quality_bucket": 99, "toxicity": "high",
            "cluster_size": "many", "url": 3, "date": None, "consent": {}}  # fmt: skip
    add_metadata(corpus, meta)
    facts = corpus_facts.corpus_facts(corpus)
    heldout = facts["splits"]["heldout"]["documents"]
    assert sum(row["documents"] for row in facts["languages"]) == heldout
    assert facts["quality_buckets"] == facts["toxicity"] == []
    assert sum(row["documents"] for row in facts["sites"]) == heldout
    render_page(facts, card_sections(facts))


def test_tables_are_bounded(corpus, monkeypatch):
    monkeypatch.setattr(corpus_facts, "MAX_KEYS", 2)
    facts = corpus_facts.corpus_facts(corpus)
    names = [row["name"] for row in facts["sites"]]
    assert len(names) == 3 and corpus_facts.OTHERS in names
    assert sum(row["documents"] for row in facts["sites"]) == facts["scanned_documents"]


def test_an_older_corpus_and_one_from_python_have_a_card(tmp_path):
    """Without held-out text, records, plan and record of the stage."""
    source = tmp_path / "pages.jsonl"
    source.write_text("".join(json.dumps({"text": prose(i)}) + "\n" for i in range(5)))
    out = tmp_path / "out"
    prepare([str(source)], out, options=DataOptions(heldout_bytes=0), cache=tmp_path)
    parts = b"".join(path.read_bytes() for path in sorted((out / "train").iterdir()))
    for name in ("train", "removed", "heldout"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "plan.json").unlink()
    (out / "units.json").unlink()
    (out / "train.jsonl.zst").write_bytes(parts)
    call("data", "card", out)
    text = (out / "card.md").read_text()
    for line in ("Records of removed documents: not recorded", "- date of the plan: not recorded",
                 "The command was not recorded", "train.jsonl.zst"):  # fmt: skip
        assert line in text, line
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert [f["split"] for f in front["configs"][0]["data_files"]] == ["train"]


def test_no_card_of_what_is_no_corpus(tmp_path, corpus):
    for folder in (tmp_path / "none", tmp_path):
        call("data", "card", folder, status=2)
    (corpus / "train/00000.jsonl.zst").write_bytes(b"damaged")
    call("data", "card", corpus, "-o", tmp_path / "card", status=2)
    assert not (tmp_path / "card").exists()


def test_the_card_changes_no_id_and_is_deleted_with_what_it_quotes(corpus, tmp_path):
    call("data", "card", corpus)
    before = call("data", "show", corpus, "--json").stdout
    ids = json.loads((corpus / "card.json").read_text())["build"]["ids"]
    digest = InputDigest(tmp_path / "index.json", cache=tmp_path)
    assert artifact_id(["corpus"], corpus, digest) == ids["corpus"]
    assert call("data", "show", corpus, "--json").stdout == before
    url = records(corpus, "--dropped", "word_count")[0]["url"]
    call("data", "forget", corpus, "--target", url)
    assert not any((corpus / name).exists() for name in CARD_FILES)
    assert not records(corpus, "--dropped", "word_count", "--url", url)


HUGE = int("9" * 400)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("funnel.json", lambda f: f["steps"][0].update(bytes=HUGE)),
        ("funnel.json", lambda f: f["steps"][0].update(documents=-1)),
        ("funnel.json", lambda f: f["steps"][0]["removed"].update(x=HUGE)),
        ("funnel.json", lambda f: next(iter(f["sources"].values())).update(files="1")),
        ("funnel.json", lambda f: f.update(steps={})),
        ("plan.json", lambda p: p.update(options=["consent"])),
        ("plan.json", lambda p: p["options"].update(crawler_names=7)),
        ("plan.json", lambda p: p["options"].update(mix={"max_epochs": "four"})),
        ("plan.json", lambda p: p.update(policies={"files": 1})),
        ("plan.json", lambda p: p.update(libraries=["x"])),
        ("plan.json", lambda p: p["files"][0].update(size=HUGE)),
        ("plan.json", lambda p: p.update(files=[3])),
        ("plan.json", lambda p: p.update(forgotten=5)),
    ],
)
def test_a_file_with_other_values_is_refused_in_one_line(corpus, name, change):
    """Each file has one schema, whoever reads it."""
    value = json.loads((corpus / name).read_text())
    change(value)
    (corpus / name).write_text(json.dumps(value))
    for command in ("card", *["show"] * (name == "funnel.json")):
        result = CliRunner().invoke(app, ["data", command, str(corpus)])
        assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
        assert name in result.output and "expected" in result.output


def test_names_of_files_and_a_strangers_counts_cannot_control_the_terminal(corpus, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "bad\x1b[31m.txt").write_bytes(b"\xff\xfe\x00" * 10)
    (source / "good.txt").write_text(prose(1))
    (source / "rows\x1b]0;title\x07.jsonl").write_text('{"text": 1}\n')
    result = call("data", "prepare", source, "-o", tmp_path / "out", "--heldout-bytes", 0)
    assert "\x1b" not in result.output and "\x07" not in result.output
    assert "\ufffd]0;title\ufffd" in result.output.replace("\n", "")  # rich wraps the line
    funnel = json.loads((corpus / "funnel.json").read_text())
    funnel["steps"][0]["step"] = HOSTILE
    funnel["steps"][0]["removed"] = {HOSTILE: 3}
    funnel["sources"] = {HOSTILE: next(iter(funnel["sources"].values()))}
    funnel["warnings"] = [HOSTILE]
    (corpus / "funnel.json").write_text(json.dumps(funnel))
    output = call("data", "show", corpus).output
    assert "alert(1)" in output and not {"\x1b", "\u202e"} & set(output)
    error = CliRunner().invoke(app, ["data", "show", f"/no\x1b[31m{tmp_path}"])
    assert error.exit_code == 2 and "\x1b" not in error.output
