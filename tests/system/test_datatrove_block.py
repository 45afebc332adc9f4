"""fastlm's steps in a pipeline of datatrove."""

import pickle
import sys

import pytest
from test_data_prepare import prose

from fastlm.data.clean import Cleaner
from fastlm.data.options import DataOptions
from fastlm.errors import InputError
from fastlm.sources.document import Document

datatrove = pytest.importorskip("datatrove")  # has no wheel for some versions of Python

from datatrove.data import Document as Item  # noqa: E402
from datatrove.executor import LocalPipelineExecutor  # noqa: E402
from datatrove.pipeline.base import PipelineStep  # noqa: E402

from fastlm.data.datatrove_block import (  # noqa: E402
    clean_block,
    extract_block,
    language_block,
    personal_data_block,
    rules_block,
)


class Excluded:
    """A writer of datatrove's interface."""

    def __init__(self):
        self.items, self.opened = [], 0

    def __enter__(self):
        self.opened += 1
        return self

    def __exit__(self, *_):
        self.opened -= 1

    def write(self, item, rank=0):
        assert self.opened == 1
        self.items.append(item)


def page(text: str) -> str:
    return f"<html><body><main><p>{text}</p></main></body></html>"


def counts(block) -> dict[str, int]:
    return {name: stat.total for name, stat in block.stats.stats.items() if name != "doc_len"}


def test_cleaning_is_that_of_a_build():
    pages = {
        "good": page(prose(1)), "empty": page(""), "short": page("The page and the line."),
        "mail": page(prose(2) + "\n\nwrite to me@host.org"),
        "refuses": "<meta name='robots' content='noai'>" + page(prose(3)),
    }  # fmt: skip
    options = DataOptions(max_words=250)
    excluded = Excluded()
    block = clean_block(options, html=True, source="web", exclusion_writer=excluded)
    assert isinstance(block, PipelineStep)
    items = [Item(text, id, metadata={"url": f"http://a.org/{id}"}) for id, text in pages.items()]
    items.append(Item(page(prose(9, 600)), "long", metadata={"dataset": "books"}))
    results = list(pickle.loads(pickle.dumps(clean_block(options, html=True))).run(list(items)))
    assert [item.id for item in results] == [item.id for item in block(list(items))]
    cleaner = Cleaner(options)
    expected = []
    for item in items:
        source = item.metadata.get("dataset", "web")
        document = Document(item.text, item.id, source, {**item.metadata, "format": "html"})
        expected += cleaner(document)
    remaining = [r.document for r in expected if r.removal is None]
    assert len([d for d in remaining if d.id.startswith("long:")]) > 1
    assert [(r.id, r.text, r.metadata) for r in results] == [
        (d.id, d.text, d.meta) for d in remaining
    ]
    assert "<EMAIL_1>" in next(r.text for r in results if r.id == "mail")
    reasons = {item.id: item.metadata["filter_reason"] for item in excluded.items}
    assert reasons.keys() == {"empty", "short", "refuses"}
    assert reasons["short"] == "quality rules: word_count" and "consent" in reasons["refuses"]
    texts = {item.id: item.text for item in excluded.items}
    assert texts["short"] and not texts["refuses"], "what must not be used is not stored either"
    totals = counts(block)
    assert totals["total"] == 6 and totals["dropped"] == 3 and totals["replaced_email"] == 1
    assert totals["forwarded"] == len(remaining)
    assert totals["dropped_quality rules: word_count"] == 1


def test_single_steps_in_an_executor(tmp_path):
    items = [
        Item(page(prose(1) + " me@host.org"), "a"),
        Item(page("Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter von heute."), "b"),
        Item(page("The page and the line are too short to learn from, says the rule."), "c"),
        Item("<script>x</script>", "d"),
    ]
    seen = []

    def collect(data, rank=0, world_size=1):
        seen.extend(data)
        return iter(())

    blocks = [
        extract_block(), language_block(["en"]), rules_block(), personal_data_block(["email"]),
    ]  # fmt: skip
    stats = LocalPipelineExecutor(
        [items, *blocks, collect], logging_dir=str(tmp_path / "logs"), tasks=1
    ).run()
    (one,) = seen
    assert one.id == "a" and "<EMAIL_1>" in one.text and "<p>" not in one.text
    assert one.metadata["language"] == "en"
    dropped = [name for block in stats.stats for name in block.stats if name.startswith("dropped_")]
    assert dropped == ["dropped_extract: no text", "dropped_language: de",
                       "dropped_quality rules: word_count"]  # fmt: skip


def test_bad_options_are_refused_where_the_block_is_made():
    with pytest.raises(InputError, match="rules"):
        rules_block(["nonsense"])
    with pytest.raises(InputError, match="kinds: expected names among"):
        personal_data_block(["nonsense"])
    with pytest.raises(InputError, match="max_words"):
        clean_block(DataOptions(max_words=0))


def test_without_datatrove_the_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastlm.data.datatrove_block")
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.base", None)
    with pytest.raises(InputError, match="pip install datatrove"):
        import fastlm.data.datatrove_block  # noqa: F401
