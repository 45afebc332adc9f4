"""Stages: one class is a recipe's table, a command, a Python call and a part of the report. The
example of CONTRIBUTING.md covers all of them.
"""

import importlib.util
import json
import re
import shutil
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import tiny_recipe
import typer
from typer.testing import CliRunner

from fastlm.data.corpus import read_documents
from fastlm.errors import InputError
from fastlm.pipeline.commands import command_of
from fastlm.pipeline.stage import TYPES, Positional, Stage, options_of
from fastlm.stages import KINDS, run_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    """The class of the worked example, from the text of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n((?:(?!```).)*?class Lengths.*?)```", text, re.DOTALL)
    assert code
    file = tmp_path_factory.mktemp("example") / "lengths.py"
    file.write_text(textwrap.dedent(code[1]))
    spec = importlib.util.spec_from_file_location("example_lengths", file)
    assert spec and spec.loader
    module = sys.modules["example_lengths"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert '"lengths": Lengths,' in text
    KINDS["lengths"] = module.Lengths
    yield module.Lengths
    del KINDS["lengths"], sys.modules["example_lengths"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A recipe for documents of 100 to 330 words, and the run folder with its prepared text."""
    folder = tmp_path_factory.mktemp("corpus")
    recipe = tiny_recipe.write(folder)
    for i, file in enumerate(sorted((folder / "docs").iterdir())):
        file.write_text(" ".join(file.read_text().split()[: 100 + 10 * i]))
    run_recipe(recipe, folder / "run", until="data")
    return recipe, folder / "run"


def words_of(run):
    return sorted(len(d.text.split()) for d in read_documents(run / "data", "train"))


def call(command, *arguments, status=0):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_the_example_of_contributing_runs_in_a_recipe(lengths, corpus, tmp_path):
    recipe, _ = corpus
    path = tmp_path / "r.toml"
    path.write_text(recipe.read_text().partition('[[stage]]\nkind = "tokenizer"')[0])
    with open(path, "a") as file:
        file.write('[[stage]]\nkind = "lengths"\n\n[[stage]]\nname = "long"\nkind = "lengths"\n')
    states: dict[str, str] = {}

    def run(*overrides):
        states.clear()
        return run_recipe(
            path, tmp_path / "run", overrides=overrides,
            on_event=lambda e: "stage" in e and states.update({e["stage"]: e["state"]}),
        )  # fmt: skip

    summary = run("long.skip=200")
    words = words_of(tmp_path / "run")
    median = words[len(words) // 2]
    assert summary["stages"]["lengths"]["median"] == median
    assert summary["stages"]["long"]["median"] > median
    html = (tmp_path / "run/report.html").read_text()
    assert "Length of the documents" in html and "<h3>long</h3>" in html
    assert f"{median} words" in html
    assert run("long.skip=200") == summary and set(states.values()) == {"skipped"}
    run("long.skip=201")
    assert states == {"data": "skipped", "lengths": "skipped", "long": "done", "report": "done"}


def test_the_example_of_contributing_is_a_command_and_a_call(lengths, corpus, tmp_path):
    _, run = corpus
    output = call(command_of(lengths), "--corpus", run / "data").stdout
    words = words_of(run)
    assert output == f"{words[len(words) // 2]} words, the longest document {words[-1]}\n"
    as_json = call(command_of(lengths), "--corpus", run / "data", "--skip", 200, "--json").stdout
    result = lengths(skip=200)(tmp_path, corpus=run / "data")
    assert json.loads(as_json) == result == json.loads((tmp_path / "scores.json").read_text())
    with pytest.raises(InputError, match="skip: expected 1 or more, got 0"):
        lengths(skip=0)(tmp_path, corpus=run / "data")
    with pytest.raises(InputError, match="corpus: expected a prepared folder, got none"):
        lengths()(tmp_path)
    with pytest.raises(InputError, match="model: unknown key; the nearest valid one is 'corpus'"):
        lengths()(tmp_path, model="x")


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_a_key_a_flag_and_a_help(kind):
    cls = KINDS[kind]
    assert issubclass(cls, Stage) and cls.kind == kind and cls.__doc__
    assert {t for takes in cls.inputs.values() for t in takes.types} | set(cls.outputs) <= set(
        TYPES
    )
    text = " ".join(call(command_of(cls), "--help").stdout.split())
    for option in options_of(cls):
        if option.name == "model":  # a table, which only recipes have
            continue
        assert option.help, f"{kind}.{option.name}"
        positional = isinstance(option.help, Positional)
        flag = option.name if positional else f"--{option.name.replace('_', '-')}"
        assert flag in text, f"{kind}: {flag}"
    # words that a recipe, a command or a call already uses
    reserved = {*cls.inputs, "name", "kind", "from", "of", "out", "cache", "threads", "log_every"}
    assert not reserved & {option.name for option in options_of(cls)}
    offered = {o.name for o in options_of(cls)}
    assert {f.name for f in fields(cls)} == offered | set(cls.unused)
    assert cls.run is not Stage.run


BRANCHES = """
[[stage]]
name = "wide"
kind = "pretrain"
max_steps = 2
model = {hidden_size = 64, intermediate_size = 64, num_hidden_layers = 1, num_attention_heads = 2}

[[stage]]
name = "both"
kind = "eval"
of = ["pretrain", "wide"]
"""


def test_a_raised_version_is_told(corpus, monkeypatch, tmp_path):
    recipe, out = corpus
    run, plans = tmp_path / "run", []
    shutil.copytree(out, run)

    def todo(*overrides):
        plans.clear()
        run_recipe(recipe, run, overrides=overrides, until="tokenizer", dry_run=True,
                   on_plan=plans.extend)  # fmt: skip
        return {p.step.name: (p.action, p.reason) for p in plans}

    assert todo()["data"] == ("skip", "done")
    version = KINDS["data"].version
    monkeypatch.setattr(KINDS["data"], "version", version + 2)
    action = ("run", f"its code has changed: version {version}, now {version + 2}")
    assert todo()["data"] == action
    assert todo("data.heldout_bytes=7000")["data"][1] == "heldout_bytes was 6000, now 7000"
    # cut off: the record says which version had begun
    table = json.loads((run / "stages.json").read_text())
    for key in ("provenance", "file_sizes", "result"):
        del table["stages"]["data"][key]
    (run / "stages.json").write_text(json.dumps(table))
    assert todo()["data"] == action
    monkeypatch.setattr(KINDS["data"], "version", version)
    docs = recipe.parent / "docs"
    text = (document := sorted(docs.iterdir())[0]).read_text()
    document.write_text(text + " and more")
    assert todo()["data"] == ("run", "the content of an input has changed")
    document.write_text(text)


def test_a_change_reaches_what_depends_on_it_and_nothing_else(tmp_path):
    recipe, run = tiny_recipe.write(tmp_path, BRANCHES), tmp_path / "run"
    states: dict[str, str] = {}
    plans: list = []

    def rerun(*overrides, **kwargs):
        states.clear()
        plans.clear()
        return run_recipe(
            recipe, run, overrides=overrides, on_plan=plans.extend,
            on_event=lambda e: "stage" in e and states.update({e["stage"]: e["state"]}), **kwargs,
        )  # fmt: skip

    def done():
        return [name for name, state in states.items() if state == "done" and name != "report"]

    summary = rerun()
    assert set(summary["stages"]["both"]["models"]) == {"pretrain", "wide"}
    html = (run / "report.html").read_text()
    assert html.count('class="columns"') == 2  # two trainings, two evaluations
    trained = (run / "pretrain/model/model.safetensors").read_bytes()
    # the plan states what will be done and why; a dry run does nothing more
    assert rerun("wide.lr=2e-3", dry_run=True) == {} and not states
    todo = {p.step.name: (p.action, p.reason) for p in plans}
    assert todo["pretrain"] == todo["quantize"] == ("skip", "done")
    assert todo["wide"] == ("run", "lr was 0.001, now 0.002")
    assert todo["both"] == ("run", "the content of an input has changed")
    rerun("wide.lr=2e-3")
    assert done() == ["wide", "both"]
    # the other branch was archived, this one was left unchanged
    assert (run / "previous/wide/model").is_dir() and not (run / "previous/pretrain").exists()
    assert (run / "pretrain/model/model.safetensors").read_bytes() == trained
    rerun("wide.lr=2e-3", "both.of=['wide']")
    assert done() == ["both"] and plans[-1].reason == "its inputs are other stages"
    # a renamed stage gets a new folder; its input stages are skipped
    recipe.write_text(recipe.read_text().replace('name = "both"', 'name = "two"'))
    rerun("wide.lr=2e-3")
    assert done() == ["two"] and plans[-1].reason == "new"


def test_a_stage_takes_from_a_folder_outside_the_run(tmp_path):
    recipe, first = tiny_recipe.write(tmp_path), tmp_path / "first"
    run_recipe(recipe, first, until="pretrain")
    second = tmp_path / "second.toml"
    second.write_text(
        f'name = "second"\n[[stage]]\nkind = "quantize"\nfrom = "{first}/pretrain"\n'
        f'data = "{first}/data"\nmethod = "rtn"\ngroup_size = 16\n'
    )
    states: list[str] = []

    def run():
        states.clear()
        return run_recipe(
            second, tmp_path / "second",
            on_event=lambda e: e.get("stage") == "quantize" and states.append(e["state"]),
        )  # fmt: skip

    summary = run()
    assert summary["stages"]["quantize"]["bits_per_byte"] > 0 and states == ["started", "done"]
    run()
    assert states == ["skipped"]
    # another model under the same path is noticed
    run_recipe(recipe, first, until="pretrain", overrides=["pretrain.max_steps=3"])
    run()
    assert states == ["started", "done"]
    second.write_text('name = "second"\n[[stage]]\nkind = "quantize"\nfrom = "no/where"\n')
    with pytest.raises(InputError, match=r"quantize\.model: no/where: expected a folder with"):
        run()


def test_a_run_folder_is_its_last_model(tmp_path):
    from fastlm.pipeline.run_folder import locate_model

    recipe, run = tiny_recipe.write(tmp_path, BRANCHES), tmp_path / "run"
    run_recipe(recipe, run)
    assert locate_model(run) == run / "wide/model"
    assert locate_model(run / "pretrain") == run / "pretrain/model"
    assert locate_model(run / "quantize") == run / "quantize"


class Runs:
    """Runs of one recipe in one folder, with the states of the last run."""

    def __init__(self, folder, more=""):
        self.recipe, self.out = tiny_recipe.write(folder, more), folder / "run"
        self.states, self.plan = {}, []

    def __call__(self, *overrides, **kwargs):
        self.states, self.plan = {}, []
        return run_recipe(
            self.recipe, self.out, overrides=overrides, on_plan=self.plan.extend,
            on_event=lambda e: "stage" in e and self.states.update({e["stage"]: e["state"]}),
            **kwargs,
        )  # fmt: skip

    def done(self):
        return [n for n, state in self.states.items() if state == "done" and n != "report"]

    def write(self, *pairs):
        text = self.recipe.read_text()
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        self.recipe.write_text(text)


def test_no_training_is_ever_deleted(tmp_path):
    run = Runs(tmp_path, BRANCHES)
    run()
    weights = "model/model.safetensors"
    first = {name: (run.out / name / weights).read_bytes() for name in ("pretrain", "wide")}
    run("wide.lr=2e-3")  # one branch, then the other: both are kept
    run("wide.lr=2e-3", "pretrain.lr=2e-2")
    assert (run.out / "previous/wide" / weights).read_bytes() == first["wide"]
    assert (run.out / "previous-2/pretrain" / weights).read_bytes() == first["pretrain"]
    # another kind takes over its name
    second = (run.out / "wide" / weights).read_bytes()
    run.write(
        ('name = "wide"\nkind = "pretrain"\nmax_steps = 2\nmodel = {hidden_size = 64,'
         " intermediate_size = 64, num_hidden_layers = 1, num_attention_heads = 2}",
         'name = "wide"\nkind = "quantize"\nfrom = "pretrain"\nmethod = "rtn"'),
    )  # fmt: skip
    run("pretrain.lr=2e-2")
    assert (run.out / "previous-3/wide" / weights).read_bytes() == second
    # an archived recipe runs in place
    states: dict[str, str] = {}
    archived = run.out / "previous"
    run_recipe(
        archived / "recipe.json", archived, until="wide",
        on_event=lambda e: "stage" in e and states.update({e["stage"]: e["state"]}),
    )  # fmt: skip
    assert states["wide"] == "skipped"


def test_somebodys_folder_with_the_name_of_a_new_stage_is_left_alone(tmp_path):
    run = Runs(tmp_path)
    run(until="data")
    (run.out / "notes").mkdir()
    (run.out / "notes/thesis.txt").write_text("precious")
    run.recipe.write_text(run.recipe.read_text() + '\n[[stage]]\nname = "notes"\nkind = "eval"\n')
    with pytest.raises(InputError, match="expected a folder in which 'notes' is free"):
        run()
    assert (run.out / "notes/thesis.txt").read_text() == "precious"


def test_until_says_what_gives_way_and_reports_all_that_is_done(tmp_path):
    run = Runs(tmp_path)
    complete = run()
    assert run(until="data")["stages"].keys() == complete["stages"].keys()
    assert run("data.heldout_bytes=5000", until="data", dry_run=True) == {}
    todo = {p.step.name: (p.action, p.training) for p in run.plan}
    assert todo["data"] == ("run", False) and todo["pretrain"] == ("archive", True)
    assert (run.out / "pretrain/model").is_dir()
    summary = run("data.heldout_bytes=5000", until="data")
    assert run.states == {"pretrain": "archived", "data": "done", "report": "done"}
    assert list(summary["stages"]) == ["data"]


def test_a_training_that_was_lost_runs_again_with_what_takes_from_it(tmp_path):
    """With a budget in seconds it does not reach the same weights."""
    run = Runs(tmp_path)
    sets = ("pretrain.max_steps=100000", "pretrain.max_seconds=0.5")
    before = run(*sets)
    shutil.rmtree(run.out / "pretrain")
    run(*sets, until="pretrain")
    assert run.done() == ["pretrain"]
    summary = run(*sets)
    assert run.done() == ["eval", "quantize"]
    scores = [s["stages"]["eval"]["models"]["pretrain"]["bits_per_byte"] for s in (before, summary)]
    assert (
        json.loads((run.out / "eval/scores.json").read_text())["models"]["pretrain"][
            "bits_per_byte"
        ]
        == scores[1]
    )


def test_scores_carry_the_names_of_now(tmp_path):
    run = Runs(tmp_path)
    run()
    run.write(('kind = "pretrain"', 'name = "base"\nkind = "pretrain"'))
    assert list(run()["stages"]["eval"]["models"]) == ["base"]


TWO = """
[[stage]]
name = "words"
kind = "tokenizer"
vocab_size = 280

[[stage]]
name = "other"
kind = "shards"

[[stage]]
name = "second"
kind = "pretrain"
from = "shards"
max_steps = 2
model = {hidden_size = 64, intermediate_size = 64, num_hidden_layers = 1, num_attention_heads = 2}
"""


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(tmp_path):
    run = Runs(tmp_path, TWO)
    expected = "second.tokenizer: expected the one that made the shards, 'tokenizer', got 'words'"
    with pytest.raises(InputError, match=re.escape(expected)):
        run()
    run("second.tokenizer=tokenizer", until="data")


def test_the_last_model_follows_the_recipe_not_the_history(tmp_path):
    from fastlm.pipeline import run_folder

    run = Runs(tmp_path, BRANCHES)
    run()
    run("pretrain.lr=2e-2")
    assert run_folder.last_model(run.out) == run.out / "wide/model"


def test_the_plan_shows_what_a_recipe_says_as_it_stands(tmp_path, monkeypatch, capsys):
    from fastlm.cli import _show_plan

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    run = Runs(tmp_path)
    run("data.sources=['docs']", until="data")
    run("data.sources=['docs/#*[0-9].txt']", until="data", dry_run=True)
    _show_plan(run.plan)
    assert "sources was ['docs'], now ['docs/#*[0-9].txt']" in capsys.readouterr().err


def test_an_optional_input_can_be_declined(tmp_path):
    run = Runs(tmp_path)
    result = run("quantize.data=[]")["stages"]["quantize"]
    assert "bits_per_byte" not in result and result["bytes"] < result["bytes_before"]
