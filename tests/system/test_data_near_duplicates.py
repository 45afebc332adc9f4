"""Near duplicates in a build: the same as `find`, also against an earlier build."""

import json

import pytest
from corpus_layouts import read_lines
from edited_pages import edited_pages

from fastlm.data.corpus import REMOVED, list_parts, read_documents
from fastlm.data.dedup import content_key
from fastlm.data.near_duplicates import find
from fastlm.data.prepare import DataOptions, prepare
from fastlm.data.shingles import jaccard, shingles

OPTIONS = {"rules": (), "scrub": (), "min_paragraph": 10**6, "heldout_bytes": 20_000}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    pages = {content_key(page): page for page in edited_pages(400)}
    return list(pages.values())


def build(texts: list[str], folder, **options) -> dict[str, list[str]]:
    """Prepare texts; return those of each split and the records of removed documents."""
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "in.jsonl").write_text("\n".join(lines))
    corpus = folder / "corpus"
    prepare(
        [str(folder / "in.jsonl")], corpus, options=DataOptions(**OPTIONS | options), cache=folder
    )
    splits = {s: [d.text for d in read_documents(corpus, s)] for s in ("train", "heldout")}
    removed = [json.loads(line) for line in read_lines(list_parts(corpus / REMOVED))]
    return {**splits, "removed": removed}


def test_a_build_removes_what_find_removes(texts, tmp_path):
    duplicates = find(texts)
    assert len(duplicates) > 40
    result = build(texts, tmp_path / "one")
    removed = {d.removed for d in duplicates}
    remaining = [text for i, text in enumerate(texts) if i not in removed]
    assert sorted(result["train"] + result["heldout"]) == sorted(remaining)
    details = {r["id"]: r["detail"] for r in result["removed"] if r["step"] == "near duplicates"}
    assert len(details) == len(duplicates)
    for duplicate in duplicates:  # line numbers start at 1
        detail = details[f"in.jsonl:{duplicate.removed + 1}"]
        assert float(detail.split()[0]) == pytest.approx(duplicate.similarity, abs=0.001)
        assert detail.endswith(f"in.jsonl:{duplicate.kept + 1}")
    assert result["heldout"]
    for text in result["heldout"]:
        nearest = max(jaccard(shingles(text), shingles(other)) for other in result["train"])
        assert nearest < 0.8


def test_a_build_leaves_out_copies_of_an_earlier_one(texts, tmp_path):
    old, new = texts[:120], texts[120:]
    build(old, tmp_path / "old", near_duplicates=0)
    earlier = (str(tmp_path / "old" / "corpus"),)
    result = build(new, tmp_path / "new", earlier=earlier)
    before = [d.text for s in ("train", "heldout") for d in read_documents(earlier[0], s)]
    removed = {d.removed - len(before) for d in find(before + new, earlier=len(before))}
    remaining = [text for i, text in enumerate(new) if i not in removed]
    assert sorted(result["train"] + result["heldout"]) == sorted(remaining)
    assert len(remaining) < len(new) - len(find(new))
