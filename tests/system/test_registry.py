"""The registry of runs: records, lineage, differences, cards, and what may befall the folders."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import tiny_recipe
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.pipeline.card import card
from fastlm.pipeline.diff import diff
from fastlm.pipeline.lineage import tree
from fastlm.pipeline.provenance import digest, model_id
from fastlm.pipeline.registry import CHANGED, DELETED, INDEX, PRESENT, append_lines, open_registry
from fastlm.pipeline.templates import code_span, escape
from fastlm.sources.input_digest import InputDigest
from fastlm.stages import KINDS, run_recipe

SMALL = ["pretrain.max_steps=3", "pretrain.validations=1", "pretrain.sample_at=[]"]


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """A folder with two runs of a small recipe, which differ in one option."""
    folder = tmp_path_factory.mktemp("registry")
    recipe = tiny_recipe.write(folder)
    for name, rate in (("one", "1e-2"), ("two", "2e-2")):
        sets = [*SMALL, f"pretrain.lr={rate}"]
        run_recipe(recipe, folder / "runs" / name, overrides=sets, command="fastlm run tiny.toml")
    return folder / "runs"


@pytest.fixture
def runs(finished_runs, tmp_path):
    """A copy of them to change."""
    shutil.copytree(finished_runs, tmp_path / "runs")
    return tmp_path / "runs"


def call(*arguments, status=0):
    result = CliRunner().invoke(app, ["runs", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_lineage_from_the_model_to_the_sources(finished_runs):
    registry = open_registry([finished_runs])
    record = registry.find_one("one")
    assert record.name == "one/pretrain" and record.state == PRESENT
    input_digest = InputDigest(finished_runs / "none", cache=finished_runs)
    assert record.model == model_id(finished_runs / "one/pretrain/model", input_digest)
    hashes = record.entry.provenance.hashes
    weights = "model/model.safetensors"
    assert hashes[weights] == digest(finished_runs / "one/pretrain" / weights)
    lineage = tree(registry, record)
    shards = next(i for i in lineage["inputs"] if i["input"] == "shards")
    corpus = next(i for i in shards["inputs"] if i["input"] == "corpus")
    assert (shards["name"], corpus["name"]) == ("one/shards", "one/data")
    (source,) = corpus["sources"]
    assert source["count"] == 24 and source["licence"] is None and len(source["files"]) == 24
    assert source["files"]["03.txt"] == digest(Path(source["spec"]) / "03.txt")
    entry = record.entry.provenance
    assert entry.code["version"] and entry.machine["threads"] >= 1 and len(entry.recipe) == 64
    output = call("show", "one", "--in", finished_runs).stdout
    assert "one/shards" in output and "licence: not recorded" in " ".join(output.split())


def test_names_paths_and_ids(runs, tmp_path):
    registry = open_registry([runs])
    model = registry.find_one("one").model
    for name in ("one/pretrain", str(runs / "one"), str(runs / "one/pretrain/model"), model[:8]):
        assert registry.find_one(name).name == "one/pretrain", name
    shutil.copytree(runs / "one/pretrain/model", tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text("a card is no content")
    assert registry.find_one(str(tmp_path / "copy")).name == "one/pretrain"
    for name, message in (
        ("quantize", "got 2: one/quantize"), ("on/pretrain", "near: one/pretrain"),
        ("zz", "12 are known"), (str(tmp_path), "expected a run"), ("", "expected a run"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            registry.find(name)


def test_the_index_quotes_no_prompt(runs):
    table = json.loads((runs / "one/stages.json").read_text())
    table["stages"]["pretrain"]["result"]["samples"] = [{"prompt": "my secret", "sample": "Yes"}]
    (runs / "one/stages.json").write_text(json.dumps(table))
    record = open_registry([runs]).find_one("one")
    assert record.entry.result["samples"]  # the run's own record has them
    index = (runs / INDEX).read_text()
    assert "one/pretrain" in index and "my secret" not in index
    open_registry([runs])
    assert (runs / INDEX).read_text() == index


def test_moved_copied_deleted_and_changed_runs(runs):
    first = open_registry([runs])
    assert {r.state for r in first.records} == {PRESENT}
    (runs / "one").rename(runs / "moved")
    shutil.copytree(runs / "moved", runs / "copied")
    registry = open_registry([runs])
    assert len(registry.records) == len(first.records)
    record = registry.find_one("moved")
    assert registry.find_one("copied").id == record.id
    assert registry.maker(first.find_one("one").model).id == record.id
    shutil.rmtree(runs / "moved")
    shutil.rmtree(runs / "copied")
    (runs / "two/quantize/report.json").write_text("{}")
    registry = open_registry([runs])
    states = {r.name: r.state for r in registry.records}
    assert states["two/quantize"] == CHANGED and states["two/pretrain"] == PRESENT
    assert sorted(s for n, s in states.items() if not n.startswith("two")) == [DELETED] * 6
    (runs / INDEX).unlink()  # rebuilt, without what is gone
    assert len(open_registry([runs]).records) == 6


def test_interrupted_and_simultaneous_writes(runs):
    open_registry([runs])
    content = (runs / INDEX).read_bytes()
    (runs / INDEX).write_bytes(content[:-20])  # the last line was cut off
    shutil.rmtree(runs / "one")
    registry = open_registry([runs])
    assert len(registry.records) == 12 and len(registry.warnings) == 1
    append_lines(runs / INDEX, [])
    rows = [[{"writer": n, "row": i, "fill": "x" * 9000} for i in range(20)] for n in range(4)]
    writers = [
        threading.Thread(target=lambda r=r: [append_lines(runs / "log.jsonl", [row]) for row in r])
        for r in rows
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = [json.loads(line) for line in (runs / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 80
    (runs / "two/stages.json").write_text("{")
    assert any("two/stages.json" in warning for warning in open_registry([runs]).warnings)


def test_differences(finished_runs):
    registry = open_registry([finished_runs])
    rows = {(row["stage"], row["what"]): row for row in diff(registry, "one", "two", kinds=KINDS)}
    rate = rows["one/pretrain | two/pretrain", "lr"]
    assert (rate["a"], rate["b"]) == (1e-2, 2e-2)
    score = rows["one/eval | two/eval", "result bits_per_byte"]
    assert score["difference"] == pytest.approx(score["b"] - score["a"]) != 0
    assert not any(stage.startswith("one/data") for stage, _ in rows)
    swapped = {(r["what"], r["a"], r["b"]) for r in diff(registry, "two", "one", kinds=KINDS)}
    assert swapped == {(r["what"], r["b"], r["a"]) for r in rows.values()}
    # a model alone, with what it comes from and what measured it
    stages = [row["stage"] for row in diff(registry, "one/pretrain", "two/pretrain", kinds=KINDS)]
    assert {"one/pretrain | two/pretrain", "one/eval | two/eval"} == set(stages)
    with pytest.raises(InputError, match="got the same"):
        diff(registry, "one", "one", kinds=KINDS)
    assert "lr" in call("diff", "one", "two", "--in", finished_runs).stdout


def test_a_card_says_what_is_recorded(runs):
    out = runs / "one/pretrain/model/README.md"
    assert call("card", "one", "--in", runs, "--language", "en").stdout.strip() == str(out)
    text = out.read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "unknown" and front["language"] == ["en"]
    assert "bits_per_byte" in front["metrics"]
    loaded = ModelCard(text)
    (result,) = [r for r in loaded.data.eval_results if r.metric_name == "bits_per_byte"]
    scores = json.loads((runs / "one/eval/scores.json").read_text())
    assert result.metric_value == scores["models"]["pretrain"]["bits_per_byte"]
    for heading in ("Intended use", "Training data", "Training procedure", "Evaluation", "Safety",
                    "Limitations", "How to reproduce"):  # fmt: skip
        assert f"## {heading}\n" in text
    assert "Intended use: not recorded." in text and "Safety: not recorded." in text
    assert "| train | 22 |" in text and "fastlm run tiny.toml" in text
    registry = open_registry([runs])
    assert registry.find_one("one").state == PRESENT  # the card changed nothing
    call("card", "one/quantize", "--in", runs, "-o", runs / "cards/q.md", "--license", "mit")
    assert "license: mit" in (runs / "cards/q.md").read_text()
    message = call("card", "one/data", "--in", runs, status=2).stderr
    assert "expected a model, got data" in message


@pytest.mark.parametrize(("training", "instructed"), [("pretrain", False), ("sft", True)])
def test_the_model_of_a_sweep_is_that_of_its_training(runs, training, instructed):
    path = runs / "one/stages.json"
    table = json.loads(path.read_text())
    table["stages"]["pretrain"] |= {"kind": "sweep", "options": {"training": training}}
    path.write_text(json.dumps(table))
    (runs / INDEX).unlink(missing_ok=True)  # has the record from before
    text = card(open_registry([runs]), open_registry([runs]).find_one("one"), kinds=KINDS)
    assert ("not tuned to follow instructions" not in text) == instructed


def test_a_card_escapes_what_it_shows(runs):
    path = runs / "one/stages.json"
    table = json.loads(path.read_text())
    evil = "x | y\n# Title <script> [a](b) `c` \U0001f600"
    provenance = table["stages"]["data"]["provenance"]
    provenance["sources"][0] |= {"spec": evil, "licence": "```\n---"}
    table["stages"]["pretrain"]["provenance"]["command"] = "fastlm\n```\n# no"
    path.write_text(json.dumps(table))
    text = card(open_registry([runs]), open_registry([runs]).find_one("one"), kinds=KINDS)
    assert yaml.safe_load(text.split("\n---\n")[0])["datasets"] == [evil]
    headings = [line for line in text.splitlines() if line.startswith("# ")]
    assert headings == ["# one/pretrain"] and "<script>" not in text.split("\n---\n")[1]
    assert escape("a|b*") == "a\\|b\\*" and code_span("a`b``c") == "``` a`b``c ```"


def test_a_stage_alone_has_a_record(finished_runs, tmp_path, monkeypatch):
    out = tmp_path / "runs/int4"
    arguments = ["quantize", "--model", finished_runs / "one", "-o", out, "--method", "rtn"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    registry = open_registry([tmp_path / "runs", finished_runs])
    record = registry.find_one("int4")
    (parent,) = [maker for key, _, maker in registry.parents(record) if key == "model"]
    assert parent.name == "one/pretrain"
    rows = json.loads(call("--in", tmp_path / "runs", "--json").stdout)
    assert [row["name"] for row in rows] == ["int4"] and rows[0]["ids"]["quantized"]
    # a path outside runs/, in a folder without runs/, with what it was made from elsewhere
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    elsewhere = shutil.copytree(out, tmp_path / "sm-int4")
    for path in (elsewhere, "../sm-int4", elsewhere / "config.json"):
        output = call("show", path).stdout
        assert "sm-int4" in output and "one/pretrain" in output and "one/data" in output
    assert "sm-int4" in call("diff", elsewhere, finished_runs / "one").stdout
    (out / "record.json").write_text('{"layout": 2, "stages": {".": 1}}')
    assert "record.json" in call("--in", tmp_path / "runs").stderr
    assert "expected a folder of runs" in call("--in", tmp_path / "none", status=2).stderr


def test_a_stage_alone_records_its_own_files(finished_runs, tmp_path):
    out = tmp_path / "mixed"
    (out / "photos").mkdir(parents=True)
    (out / "photos/large.bin").write_bytes(b"x" * 1000)
    (out / "letter.txt").write_text("private")
    os.utime(out / "letter.txt", (1, 1))
    tokenizer = str(finished_runs / "one/tokenizer")
    arguments = ["data", "shards", str(finished_runs / "one/data"), "-t", tokenizer, "-o", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = open_registry([tmp_path]).find_one("mixed")
    names = set(record.entry.file_sizes)
    assert "train/index.json" in names and not names & {"letter.txt", "photos/large.bin"}
    assert record.ids == open_registry([finished_runs]).find_one("one/shards").ids
