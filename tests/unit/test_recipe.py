"""Recipes: what is read, what is refused and with which message; shipped recipes are valid."""

import json

import pytest
import tiny_recipe
from paths import ROOT

from fastlm.errors import InputError
from fastlm.stages import load_recipe, run_recipe

SHIPPED = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.fixture
def path(tmp_path):
    return tiny_recipe.write(tmp_path)


def stage(recipe, name):
    return recipe.step(name).stage


def test_tables_become_the_stages_own_options(path):
    recipe = load_recipe(path)
    names = ["data", "tokenizer", "shards", "pretrain", "eval", "quantize"]
    assert [step.name for step in recipe.steps] == names
    pretrain = stage(recipe, "pretrain")
    assert pretrain.max_steps == 12 and pretrain.batch_size == 4
    assert pretrain.sample_at == (0.0, 1.0) and pretrain.seed == recipe.seed == 3
    assert stage(recipe, "data").rules == ()
    config = pretrain.model_config(300, 0)
    assert config.vocab_size == 300 and config.max_position_embeddings == 32
    assert config.tie_word_embeddings


def test_overrides(path):
    sets = ["pretrain.max_seconds=60", "name=other", "data.rules=['web']", "pretrain.seed=5"]
    recipe = load_recipe(path, [*sets, "pretrain.model.hidden_size=64"])
    pretrain = stage(recipe, "pretrain")
    assert pretrain.max_seconds == 60.0 and recipe.name == "other"
    assert pretrain.seed == 5 and pretrain.model["hidden_size"] == 64
    assert "word_count" in stage(recipe, "data").rules


@pytest.mark.parametrize(
    "override, text",
    [
        (
            "pretrain.bach_size=4",
            "pretrain.bach_size: unknown key; the nearest valid one is 'batch_size'",
        ),
        ("max_seconds=5", "unknown key; the nearest valid one is pretrain.max_seconds"),
        ("batch_size=5", "the nearest valid one is pretrain.batch_size or eval.batch_size"),
        ("pretrian.lr=1", "set: pretrian.lr: unknown key; the nearest valid one is 'pretrain'"),
        (
            "pretrain.model.hiden_size=4",
            "model.hiden_size: unknown key; the nearest valid one is 'hidden_size'",
        ),
        (
            "pretrain.model.num_attention_heads=3",
            "model.hidden_size: expected a multiple of num_attention_heads 3",
        ),
        (
            "pretrain.batch_size='four'",
            "pretrain.batch_size: expected a whole number, got 'four'",
        ),
        ("pretrain.batch_size=4.5", "pretrain.batch_size: expected a whole number, got 4.5"),
        (
            "pretrain.batch_size=true",
            "pretrain.batch_size: expected a whole number, got True",
        ),
        ("pretrain.lr='fast'", "pretrain.lr: expected a number, got 'fast'"),
        ("pretrain.lr=nan", "pretrain.lr: expected a finite number"),
        ("pretrain.betas=[0.9]", r"pretrain.betas\[1\]: expected this field, got nothing"),
        ("pretrain.betas=0.9", "pretrain.betas: expected an array, got 0.9"),
        ("data.sources=[1]", r"data.sources\[0\]: expected a string, got 1"),
        ("data.sources=[]", "data.sources: expected at least one source"),
        ("pretrain=3", "pretrain: unknown key"),
        ("stage=3", r"stage: expected a list of tables, \[\[stage\]\]"),
        ("pretrain.model=3", "pretrain.model: expected an object, got 3"),
        ("pretrain.kind='pretrian'", "stage 4.kind: expected one of .*did you mean 'pretrain'"),
        ("eval.name=report", "stage.name: expected a name that .* got 'report'"),
        ("eval.name='a/b'", "stage.name: expected a name that is valid"),
        ("eval.name=data", "stage.name: 'data' is used twice"),
        ("eval.of=pretrian", "eval.of: expected the name of an earlier stage .* one is 'pretrain'"),
        ("eval.of=quantize", "eval.of: expected an earlier stage, 'quantize' comes later"),
        ("eval.of=shards", "eval.of: expected a stage that makes model or quantized; 'shards'"),
        ("eval.of=3", "eval.of: expected the name of a stage or a path, got 3"),
        ("quantize.from=['pretrain', 'pretrain']", "quantize.from: expected one, got 2"),
        ("pretrain.max_steps=0", "pretrain.max_steps: expected a positive number, got 0"),
        ("data.workers=0", "data.workers: expected 1 or more, got 0"),
        ("eval.stride=64", "eval.stride: expected at most the window of 32 tokens, got 64"),
        ("lr", "set: expected NAME.KEY=VALUE"),
        ("name=''", "name: expected the name of a folder below runs/, got ''"),
        ("name='../other'", "name: expected the name of a folder"),
        ("name='/tmp/x'", "name: expected the name of a folder"),
        ("seed=-1", "seed: expected 0 or more and less than 2"),
        ("tokenizer.vocab_size=5", "tokenizer.vocab_size: expected at least 259"),
        ("tokenizer.train_bytes=0", "tokenizer.train_bytes: expected 1 or more"),
        ("quantize.format='w4a17'", "quantize.format: expected one of w4a16"),
        ("quantize.method='magic'", "quantize.method: expected one of rtn"),
        ("quantize.overrides=['head']", "quantize.overrides: expected PATTERN=FORMAT"),
        ("quantize.group_size=-3", "quantize.group_size: expected -1"),
        ("quantize.embeddings=3", "quantize.embeddings: expected 4, 8, 16"),
        ("quantize.head=8", "quantize.head: CausalLM has no head besides its embeddings"),
    ],
)  # fmt: skip
def test_refusals_name_the_key_what_is_wanted_and_what_came(path, override, text):
    with pytest.raises(InputError, match=text) as e:
        load_recipe(path, [override])
    assert "\n" not in str(e.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = [")
    with pytest.raises(InputError, match="expected TOML"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(InputError, match="name: expected the name of the run"):
        load_recipe(tmp_path / "empty.toml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert recipe.name == path.stem and recipe.description


def test_improve_is_planned_before_its_inputs_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    improve, plan = next(path for path in SHIPPED if path.stem == "improve"), []
    run_recipe(improve, tmp_path / "out", dry_run=True, cache=tmp_path, on_plan=plan.extend)
    reasons = {planned.step.name: planned.reason for planned in plan}
    assert reasons["feedback"] == "feedback.db: expected a feedback database, not found"
    assert "runs/chat/ppo" in reasons["sft"] and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"feedback\.db: expected a feedback database"):
        run_recipe(improve, tmp_path / "out", cache=tmp_path)


def test_settings_are_beside_the_recipe_and_all_else_in_the_current_folder(tmp_path, monkeypatch):
    improve = next(path for path in SHIPPED if path.stem == "improve")
    (tmp_path / "here").mkdir()
    (tmp_path / "gates").mkdir()
    recipe, gates = tmp_path / "r.toml", tmp_path / "gates" / "improve.toml"
    recipe.write_text(improve.read_text())
    gates.write_text((improve.parent / "gates" / "improve.toml").read_text())
    monkeypatch.chdir(tmp_path / "here")
    read = load_recipe("../r.toml")
    assert stage(read, "gate").gates == "../gates/improve.toml"
    assert stage(read, "feedback").database == ("feedback.db",)
    (tmp_path / "here" / "mine.toml").write_text(gates.read_text())
    assert stage(load_recipe("../r.toml", ["gate.gates=mine.toml"]), "gate").gates == "mine.toml"
    # of a run: as it was used
    (tmp_path / "recipe.json").write_text(json.dumps(read.table))
    assert load_recipe("../recipe.json").steps == read.steps
    gates.unlink()
    with pytest.raises(InputError, match=r"\.\./gates/improve\.toml: expected a readable"):
        load_recipe("../r.toml")


MORE = """
[[stage]]
name = "wide"
kind = "pretrain"
max_steps = 2
seed = 9
model = {hidden_size = 64, intermediate_size = 64, num_hidden_layers = 1, num_attention_heads = 2}

[[stage]]
name = "both"
kind = "eval"
of = ["pretrain", "wide", "quantize"]

[[stage]]
name = "small"
kind = "quantize"
from = "pretrain"
"""


def test_stages_take_from_the_last_that_fits_or_from_where_they_say(tmp_path):
    path = tiny_recipe.write(tmp_path)
    path.write_text(path.read_text() + MORE)
    recipe = load_recipe(path)
    edges = {step.name: dict(step.inputs) for step in recipe.steps}
    assert edges["eval"] == {"model": ("pretrain",), "data": ("data",), "training_data": ()}
    assert edges["wide"] == {"shards": ("shards",), "tokenizer": ("tokenizer",)}
    both = {"model": ("pretrain", "wide", "quantize"), "data": ("data",), "training_data": ()}
    assert edges["both"] == both
    assert edges["small"]["model"] == ("pretrain",)
    assert stage(recipe, "wide").seed == 9
    recipe = load_recipe(path, ["small.from=./elsewhere", "small.group_size=8"])
    assert dict(recipe.step("small").inputs)["model"] == ("./elsewhere",)
    assert stage(recipe, "small").group_size == 8
    renamed = ["pretrain.name=model", "eval.of=model", "quantize.from=model", "small.from=model"]
    recipe = load_recipe(path, [*renamed, "both.of=['model', 'wide']"])  # no package's scheme
    assert recipe.step("eval").inputs["model"] == ("model",)
    with pytest.raises(InputError, match=r"small\.model: duplicate key for the input 'model'"):
        load_recipe(path, ["small.model=wide"])


OUTSIDE = """
[inputs]
old = "./served"

[[stage]]
name = "pair"
kind = "eval"
of = ["old", "pretrain"]

[[stage]]
name = "smaller"
kind = "quantize"
from = "old"
"""


def test_what_comes_from_outside_has_one_name(tmp_path):
    path = tiny_recipe.write(tmp_path)
    path.write_text(path.read_text() + OUTSIDE)

    def inputs(*overrides):
        recipe = load_recipe(path, overrides)
        steps = (recipe.step("pair"), recipe.step("smaller"))
        return [step.inputs["model"] for step in steps]

    assert inputs() == [("./served", "pretrain"), ("./served",)]
    assert inputs("inputs.old=/srv/m") == [("/srv/m", "pretrain"), ("/srv/m",)]
    assert load_recipe(path, ["inputs.old=model:smollm2"]).table["inputs"]["old"] == "model:smollm2"
    for override, text in (
        ("inputs.old=served", "inputs.old: expected a path with a /, got 'served'"),
        ("inputs.old=3", "inputs.old: expected a path with a /, got 3"),
        ("inputs.older=/srv/m", "inputs.older: expected a stage that has it as an input, got none"),
        (
            "data.sources=['older']\ninputs.older=/srv/m",
            "inputs.older: expected a stage that has it",
        ),
        ("inputs.pretrain=/srv/m", "inputs.pretrain: expected a name that is neither"),
        ("inputs=3", "inputs: expected a table, got 3"),
        ("pair.name=inputs", "stage.name: expected a name that .* got 'inputs'"),
        ("pair.of=['old', './served']", "pair.of: expected each once"),
        ("pair.of=['odl', 'pretrain']", "pair.of: .*the nearest one is 'old'"),
    ):
        with pytest.raises(InputError, match=text):
            load_recipe(path, override.splitlines())


def test_a_stage_whose_input_nobody_makes(tmp_path):
    (tmp_path / "r.toml").write_text('name = "r"\n[[stage]]\nkind = "tokenizer"\n')
    with pytest.raises(InputError, match=r"tokenizer.corpus: expected an earlier stage that makes"):
        load_recipe(tmp_path / "r.toml")


def test_the_ablation_compares_equal_models_of_two_builds_of_the_same_pages():
    recipe = load_recipe(ROOT / "recipes" / "data-ablation.toml")
    raw, cleaned, other = (stage(recipe, name) for name in ("raw", "cleaned", "other"))
    assert raw.sources == cleaned.sources and not set(raw.sources) & set(other.sources)
    assert raw.rules == () and not raw.scrub and not raw.near_duplicates
    assert cleaned.rules and cleaned.scrub and cleaned.near_duplicates
    steps = [step for step in recipe.steps if step.stage.kind == "pretrain"]
    models = {build: [s for s in steps if s.name.startswith(build)] for build in ("raw", "cleaned")}
    assert len({step.stage.seed for step in models["raw"]}) == 3
    for one, two in zip(models["raw"], models["cleaned"], strict=True):
        assert one.stage == two.stage  # with the same seed and as many tokens
        assert one.inputs["shards"] == ("raw-shards",)
        assert two.inputs["shards"] == ("cleaned-shards",)
    assert set(recipe.step("eval").inputs["model"]) == {step.name for step in steps}
    assert recipe.step("eval").inputs["data"] == ("other",)
