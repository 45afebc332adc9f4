"""Every reader of a corpus reads parts, and the files that older versions wrote, alike."""

import json
import shutil

import pytest
import tiny_recipe
from corpus_layouts import LAYOUTS, prepare_in, split_path
from test_cli import call, refused

from fastlm.data.corpus import SPLITS, corpus_parts
from fastlm.data.prepare import prepare
from fastlm.data.shards import INDEX, write_shard_files
from fastlm.data.texts import has_splits, read_texts
from fastlm.pipeline.card import card
from fastlm.pipeline.diff import diff
from fastlm.pipeline.provenance import artifact_id, output_files
from fastlm.pipeline.registry import PRESENT, open_registry
from fastlm.quant.calibration import has_conversations
from fastlm.sources.input_digest import InputDigest
from fastlm.stages import KINDS, run_recipe
from fastlm.tokenizer import corpus_encoding

SMALL = ["pretrain.max_steps=2", "pretrain.validations=1", "pretrain.sample_at=[]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the same run in both layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    recipe = tiny_recipe.write(folder)
    for layout in LAYOUTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastlm.data.prepare.prepare", prepare_in(layout, prepare))
            run_recipe(recipe, folder / "runs" / layout, overrides=SMALL, until="eval")
    return folder / "runs"


def contents(folder, pattern="*"):
    files = [p for p in sorted(folder.rglob(pattern)) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_a_run_is_the_same(runs):
    for name in ("tokenizer", "shards"):
        first, second = (contents(runs / layout / name) for layout in LAYOUTS)
        assert first and first == second
    scores = [json.loads((runs / x / "eval/scores.json").read_text()) for x in LAYOUTS]
    assert scores[0] == scores[1] and scores[0]["models"]["pretrain"]["bits_per_byte"] > 0
    assert len(corpus_parts(runs / "parts/data", "train")) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_runs_again_until_the_text_differs(runs, layout, tmp_path):
    shutil.copytree(runs / layout, tmp_path / "run")

    def states():
        events = []
        run_recipe(
            runs.parent / "tiny.toml", tmp_path / "run", overrides=SMALL, until="shards",
            on_event=lambda e: events.append((e.get("stage"), e.get("state"))),
        )  # fmt: skip
        return events[:3]

    assert states() == [(name, "skipped") for name in ("data", "tokenizer", "shards")]
    corpus_parts(tmp_path / "run/data", "train")[-1].write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlm.data.prepare.prepare", prepare_in(layout, prepare))
        assert ("data", "started") in states()
    assert contents(tmp_path / "run/data", "*.zst") == contents(runs / layout / "data", "*.zst")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_encoding_continues_in_a_run(runs, layout, tmp_path, monkeypatch):
    """Killed while the held-out split is encoded: the training split is not encoded again."""
    recipe, run = runs.parent / "tiny.toml", tmp_path / "run"
    for name in ("data", "tokenizer"):
        shutil.copytree(runs / layout / name, run / name)
    shutil.copy(runs / layout / "stages.json", run)
    shutil.copy(runs / layout / "sources.json", run)
    calls = []

    def write(texts, *arguments):
        calls.append(list(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_shard_files(calls[-1], *arguments)

    monkeypatch.setattr(corpus_encoding, "write_shard_files", write)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, run, overrides=SMALL, until="shards")
    run_recipe(recipe, run, overrides=SMALL, until="shards")
    assert len(calls) == 3 and calls[1] == calls[2] == [*read_texts(run / "data")]
    assert contents(run / "shards") == contents(runs / layout / "shards")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_id_of_a_corpus(runs, layout, tmp_path):
    registry = open_registry([runs])
    record = registry.find_one(f"{layout}/data")
    assert record.state == PRESENT
    data = runs / layout / "data"
    parts = [p.relative_to(data).as_posix() for split in SPLITS for p in corpus_parts(data, split)]
    hashes = record.provenance.hashes.keys()
    assert {*parts} <= hashes
    assert {*parts} == {name for name in hashes if not name.startswith("removed/")} - {
        "funnel.json", "units.json", "plan.json",
    }  # fmt: skip
    assert {*parts} <= output_files({"corpus": "."}, data).keys() <= hashes
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "funnel.json").write_text("{}")
    (copy / "removed").mkdir(exist_ok=True)
    (copy / "removed/00000.jsonl.zst").write_bytes(b"no content")

    def content_id(path):
        return artifact_id(("corpus",), path, InputDigest(tmp_path / "none", cache=tmp_path))

    assert content_id(copy) == record.ids["corpus"]
    assert content_id(split_path(copy, "train")) in record.output_ids()
    corpus_parts(copy, "heldout")[0].write_bytes(b"")
    assert content_id(copy) != record.ids["corpus"]
    assert content_id(split_path(copy, "heldout")) not in record.output_ids()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_commands_take_a_corpus_and_its_splits(runs, layout, tmp_path):
    run, data = runs / layout, runs / layout / "data"
    train, heldout = (split_path(data, split) for split in SPLITS)
    assert has_splits(data) and not has_splits(train)
    assert not any(has_conversations(path, tmp_path) for path in (data, train, heldout))
    assert [*read_texts(train)] == [*read_texts(data, split="train")] != [*read_texts(heldout)]
    words = contents(run / "tokenizer", "tokenizer.json")
    for number, path in enumerate((data, train)):
        out = tmp_path / f"t{number}"
        call("tokenizer", "train", path, "-o", out, "--vocab-size", 300)
        assert contents(out, "tokenizer.json") == words
    for path, shards in ((train, "shards/train"), (heldout, "shards/heldout")):
        out = tmp_path / shards
        call("data", "shards", path, "-t", run / "tokenizer", "-o", out)
        assert contents(out, "[0-9]*") == contents(run / shards, "[0-9]*")
        assert (out / INDEX).read_bytes() == (run / shards / INDEX).read_bytes()
        # the split of a corpus is known as the output of the run that made it
        registry = open_registry([runs, tmp_path])
        (record,) = (r for r in registry.records if r.path.absolute() == out.absolute())
        makers = {key: maker for key, _, maker in registry.parents(record)}
        assert makers["corpus"] is not None and makers["corpus"].name == f"{layout}/data"
    options = ["eval", "-m", run, "--json", "--data"]
    whole, split = (json.loads(call(*options, path).stdout) for path in (data, heldout))
    assert [*whole["models"].values()] == [*split["models"].values()]
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("data", "shards", empty, "-t", run / "tokenizer", "-o", tmp_path / "e",
            text="expected a corpus of fastlm data prepare")  # fmt: skip


def test_card_and_diff(runs):
    registry = open_registry([runs])
    for layout in LAYOUTS:
        assert "| train | 22 |" in card(registry, registry.find_one(layout), kinds=KINDS)
    rows = {(row["stage"], row["what"]) for row in diff(registry, *LAYOUTS, kinds=KINDS)}
    assert ("files/shards | parts/shards", "input corpus") in rows  # other files, other ids
    assert not any(what.startswith("result") for _, what in rows)
