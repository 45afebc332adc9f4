"""Sweeps: statistics by hand, runs that equal trainings alone, resuming, more values, runs that
diverge, what is refused before any run, recipes, the command and the report.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import preference_models
import pytest
from scipy import stats
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.pipeline.record import StageRecords, scores
from fastlm.schema import read_document
from fastlm.stages import parse_recipe, run_recipe
from fastlm.train.objective import DivergedError
from fastlm.train.sft import SFT, SFTObjective
from fastlm.train.sweep import TRAININGS, Sweep
from fastlm.train.sweep_statistics import best_value, compare_values

OPTIONS = {
    "max_steps": 4, "batch_size": 4, "heldout": 0.25, "validations": 2, "sample_at": [],
    "dtype": "float32",
}  # fmt: skip
RATES = [1e-4, 1e-2]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return preference_models.make_base(
        tmp_path_factory.mktemp("base") / "base", num_hidden_layers=1
    )


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    words = preference_models.WORDS
    rows = [{"prompt": f"what is {a}", "completion": f"{a} please {b}"}
            for a in words[:5] for b in words[:4]]  # fmt: skip
    return preference_models.write(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


def sft_sweep(chats: str, **changes) -> Sweep:
    defaults = {"options": {**OPTIONS, "data": [chats]}, "grid": {"lr": RATES}, "seeds": (0, 1)}
    return Sweep(**{"training": "sft", **defaults, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, chats) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, sft_sweep(chats)(out, model=base)


def test_the_summary_of_a_value_is_that_of_its_seeds():
    a, b = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 3.5, 2: 4.5}
    first, second = compare_values([a, b], 0)
    assert (first.n, first.mean, first.difference) == (3, 2.0, None)
    assert first.error == pytest.approx(1 / math.sqrt(3))
    t = stats.t.ppf(0.975, 2)
    assert first.low == pytest.approx(2 - t / math.sqrt(3))
    assert first.high == pytest.approx(2 + t / math.sqrt(3))
    assert second.difference == pytest.approx(1.0)  # of 0, 1.5, 1.5
    assert second.p == pytest.approx(stats.ttest_rel([*b.values()], [*a.values()]).pvalue)
    error = 0.5  # sqrt((1 + 0.25 + 0.25) / 2) / sqrt(3)
    assert second.difference_low == pytest.approx(1 - t * error)
    assert second.difference_high == pytest.approx(1 + t * error)


def test_p_is_adjusted_for_all_pairs_of_values():
    scores = [{0: 0.0, 1: 0.0, 2: 0.0}, {0: 0.9, 1: 1.0, 2: 1.1}, {0: 2.7, 1: 3.0, 2: 3.3}]
    rows = compare_values(scores, 0)
    raw = {
        pair: stats.ttest_rel([*scores[pair[0]].values()], [*scores[pair[1]].values()]).pvalue
        for pair in ((0, 1), (0, 2), (1, 2))
    }
    smallest, second, largest = sorted(raw.values())
    adjusted = {
        smallest: 3 * smallest,
        second: max(3 * smallest, 2 * second),
        largest: max(3 * smallest, 2 * second, largest),
    }
    assert rows[1].p == pytest.approx(adjusted[raw[0, 1]])
    assert rows[2].p == pytest.approx(adjusted[raw[0, 2]])
    assert rows[1].p > raw[0, 1]


def test_equal_values_seldom_differ_from_the_best():
    draw, found = np.random.default_rng(0), 0
    for _ in range(200):
        shared = draw.normal(size=3)  # by the seeds
        scores = [dict(enumerate((shared + draw.normal(size=3)).tolist())) for _ in range(4)]
        rows = compare_values(scores, best_value(scores, [0] * 4, False) or 0)
        found += any(row.p is not None and row.p < 0.05 for row in rows)
    assert found <= 16  # more than 16 of 200 at a rate of .05: a chance of .02


def test_values_that_differ_are_found():
    draw, found = np.random.default_rng(0), 0
    for _ in range(200):
        scores = [dict(enumerate((10 * i + draw.normal(size=3)).tolist())) for i in range(2)]
        rows = compare_values(scores, best_value(scores, [0] * 2, False) or 0)
        found += any(row.p is not None and row.p < 0.05 for row in rows)
    assert found >= 150


def test_too_few_seeds_have_no_error():
    (only,) = compare_values([{3: 1.5}], 0)
    assert (only.n, only.mean, only.error, only.low, only.p) == (1, 1.5, None, None, None)
    rows = compare_values([{0: 1.0, 1: 2.0}, {}, {0: 1.0}], 0)
    assert (rows[1].n, rows[1].mean, rows[1].p) == (0, None, None)
    assert (rows[2].mean, rows[2].difference) == (1.0, None)


def test_the_best_value_has_the_best_mean_among_those_with_fewest_failures():
    scores = [{0: 1.0, 1: 3.0}, {0: 1.5, 1: 1.5}, {0: 0.1}]
    assert best_value(scores, [0, 0, 1], greater_is_better=False) == 1
    assert best_value(scores, [0, 0, 1], greater_is_better=True) == 0
    assert best_value(scores, [1, 1, 1], greater_is_better=False) == 2
    assert best_value([{}, {}], [2, 2], greater_is_better=False) is None


def test_a_run_is_the_training_alone(finished, base, chats, tmp_path):
    out, result = finished
    assert [row["name"] for row in result["runs"]] == [
        "lr=0.0001,seed=0", "lr=0.0001,seed=1", "lr=0.01,seed=0", "lr=0.01,seed=1",
    ]  # fmt: skip
    options = {**OPTIONS, "data": (chats,), "sample_at": ()}
    alone = SFT(lr=1e-2, seed=1, **options)(tmp_path / "alone", model=base)
    run = out / "runs" / "lr=0.01,seed=1"
    assert preference_models.weights_of(run) == preference_models.weights_of(tmp_path / "alone")
    row = result["runs"][3]
    assert row["score"] == alone["metrics"]["val_loss"]
    lines = [m for m in preference_models.metrics_of(run) if "val_loss" in m]
    assert [value for _, value in row["curve"]] == [line["val_loss"] for line in lines]
    assert row["curve"][0][0] == 0 and row["curve"][-1][0] == alone["tokens"]


def test_the_best_value_and_its_best_run_are_the_output(finished):
    out, result = finished
    scores = {row["name"]: row["score"] for row in result["runs"]}
    slow, fast = result["values"]
    assert slow["values"] == {"lr": 1e-4} and fast["values"] == {"lr": 1e-2}
    assert fast["mean"] == pytest.approx((scores["lr=0.01,seed=0"] + scores["lr=0.01,seed=1"]) / 2)
    assert fast["mean"] < slow["mean"] and result["val_loss"] == fast["mean"]
    best = min(("lr=0.01,seed=0", "lr=0.01,seed=1"), key=scores.__getitem__)
    assert result["best"] == best
    assert preference_models.weights_of(out) == preference_models.weights_of(out / "runs" / best)


def test_finished_runs_are_kept(finished, base, chats, tmp_path, monkeypatch):
    trained = []
    run = SFT.run
    monkeypatch.setattr(SFT, "run", lambda self, ctx: trained.append(ctx.name) or run(self, ctx))
    grown = sft_sweep(chats, grid={"lr": [1e-2, 3e-3]}, seeds=(0, 1))
    out = tmp_path / "out"
    first = sft_sweep(chats, grid={"lr": [1e-2]}, seeds=(0,))(out, model=base)
    assert first["values"][0]["error"] is None
    with pytest.raises(KeyboardInterrupt):  # in the second run
        monkeypatch.setattr(SFT, "run", interrupted(run, trained))
        grown(out, model=base)
    monkeypatch.setattr(SFT, "run", lambda self, ctx: trained.append(ctx.name) or run(self, ctx))
    with pytest.raises(InputError, match=r"out: expected a new folder, .*got .*lr=0.01,seed=1"):
        changed = {**OPTIONS, "data": [chats], "max_steps": 5}
        shutil.rmtree(out / "runs" / "lr=0.01,seed=0")  # finished; the other one was interrupted
        replace(grown, options=changed, seeds=(1,))(out, model=base)
    result = grown(out, model=base)
    assert trained == [
        "lr=0.01,seed=0", "lr=0.01,seed=1", "lr=0.01,seed=0", "lr=0.01,seed=1",
        "lr=0.003,seed=0", "lr=0.003,seed=1",
    ]  # fmt: skip
    assert result["runs"][:2] == [
        {**row, "seconds": here["seconds"]}
        for row, here in zip(finished[1]["runs"][2:], result["runs"])
    ]
    other = sft_sweep(chats, options={**OPTIONS, "data": [chats], "max_steps": 5})
    with pytest.raises(InputError, match=r"out: expected a new folder, or one of a sweep with"):
        other(finished[0], model=base)


def interrupted(run, trained):
    def stop(self, ctx):
        trained.append(ctx.name)
        raise KeyboardInterrupt

    return stop


def diverging(monkeypatch, rates) -> None:
    """Let the trainings at these rates diverge in their third step."""
    loss = SFTObjective.loss

    def explode(self, batch, num_items):
        bad = self.options.lr in rates and self.trained.training
        return loss(self, batch, num_items) * (math.nan if bad else 1)

    monkeypatch.setattr(SFTObjective, "loss", explode)


def test_a_run_that_diverges_is_reported_and_the_sweep_continues(
    base, chats, tmp_path, monkeypatch
):
    diverging(monkeypatch, {3.0})
    events: list[dict] = []
    sweep = sft_sweep(chats, grid={"lr": [3.0, 1e-2]})
    ctx = sweep.context(tmp_path / "out", model=base, on_event=events.append)
    result = sweep.run(ctx)
    bad, good = result["values"]
    assert (bad["n"], bad["diverged"], bad["mean"]) == (0, 2, None)
    assert (good["n"], good["diverged"]) == (2, 0)
    assert "the loss is nan" in result["runs"][0]["error"]
    warnings = [event["warning"] for event in events if "warning" in event]
    assert [w.split(" diverged: ")[0] for w in warnings] == ["lr=3.0,seed=0", "lr=3.0,seed=1"]
    assert "2 of 4 runs diverged" in sweep.summary(result, ctx)
    section = sweep.report(ctx, result)
    assert "the loss is nan" in section.facts["lr=3.0,seed=1 diverged"]
    assert json.loads(json.dumps(result, allow_nan=False)) is not None


def test_a_sweep_in_which_all_runs_diverge_fails(base, chats, tmp_path, monkeypatch):
    diverging(monkeypatch, {3.0})
    with pytest.raises(DivergedError, match=r"all 1 runs diverged; lr=3.0,seed=0: step 1"):
        sft_sweep(chats, grid={"lr": [3.0]}, seeds=(0,))(tmp_path / "out", model=base)


REFUSED = [
    ({"training": "eval"}, "training: expected one of pretrain, sft"),
    ({"options": {"learning_rate": 1}}, "options.learning_rate: unknown key; the nearest"),
    ({"grid": {"rl": [1]}}, "grid.rl: unknown key; the nearest valid one is 'lr'"),
    ({"options": {"seed": 1}}, "options.seed: expected the seeds in the option seeds"),
    ({"grid": {"seed": [1, 2]}}, "grid.seed: expected the seeds in the option seeds"),
    ({"options": {"lr": 1e-3}}, "grid.lr: expected no value in options too"),
    ({"grid": {"lr": []}}, "grid.lr: expected at least one value"),
    ({"grid": {"lr": [1e-3, 1e-3]}}, "grid.lr: expected each value once"),
    ({"grid": {"lr": [1e-3, "fast"]}}, "grid.lr: expected a number, got 'fast'"),
    ({"grid": {"lr": [1e-3, -1.0]}}, "grid.lr: expected a positive number, got -1.0"),
    ({"options": {"max_steps": 0}}, "options.max_steps: expected a positive number, got 0"),
    ({"options": {"validations": 0}}, "options.validations: expected 1 or more, for val_loss"),
    ({"options": {"heldout": 0}}, "options.heldout: expected a share above 0, for val_loss"),
    ({"seeds": ()}, "seeds: expected at least one value"),
    ({"seeds": (1, 1)}, "seeds: expected each value once, got 1, 1"),
    ({"seeds": (-1,)}, "seeds: expected 0 or more, got -1"),
    ({"metric": "loss"}, "metric: expected one of val_loss, got 'loss'"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_what_cannot_work_is_refused_before_any_run(changes, message, base, tmp_path):
    defaults = {"training": "sft", "grid": {"lr": RATES}}
    with pytest.raises(InputError) as error:
        Sweep(**{**defaults, **changes})(tmp_path / "out", model=base)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_metric_without_held_out_rows_is_refused(base, tmp_path):
    rows = [{"prompt": "what is tree", "completion": "tree"}]
    file = preference_models.write(tmp_path / "one.jsonl", rows)
    sweep = Sweep("sft", options={**OPTIONS, "data": [file], "heldout": 1e-9}, seeds=(0,))
    with pytest.raises(InputError, match="metric: expected val_loss on held-out data, got none"):
        sweep(tmp_path / "out", model=base)


def recipe(base: Path, chats: str, **changes) -> dict:
    entry = {
        "kind": "sweep", "training": "sft", "from": str(base), "seeds": [0, 1],
        "options": {**OPTIONS, "data": [chats]}, "grid": {"lr": RATES}, **changes,
    }  # fmt: skip
    after = {"kind": "sft", "data": [chats], "max_steps": 1, "heldout": 0, "validations": 0}
    return {"name": "rates", "stage": [entry, {**after, "name": "after", "sample_at": []}]}


def test_a_recipe_continues_a_sweep_with_more_values(base, chats, tmp_path):
    path, out = tmp_path / "recipe.json", tmp_path / "run"

    def run(**changes) -> tuple[dict, list[str]]:
        path.write_text(json.dumps(recipe(base, chats, **changes)))
        events: list[dict] = []
        summary = run_recipe(path, out, on_event=events.append)
        states = [f"{e['stage']} {e['state']}" for e in events if "stage" in e]
        return summary["stages"], [*states, *(e["info"] for e in events if "info" in e)]

    stages, _ = run(grid={"lr": [1e-2]}, seeds=[0])
    assert stages["sweep"]["values"][0]["n"] == 1
    record = (out / "sweep" / "runs" / "lr=0.01,seed=0" / "record.json").read_bytes()
    stages, states = run(grid={"lr": [1e-2, 3e-3]})
    assert [row["n"] for row in stages["sweep"]["values"]] == [2, 2]
    # the sweep continues; the stage after it trains its new model again
    assert states[:4] == ["after archived", "sweep started", "sweep done", "after started"]
    kept = (out / "sweep" / "runs" / "lr=0.01,seed=0" / "record.json").read_bytes()
    assert kept == record
    page = (out / "report.html").read_text()
    assert "Sweep of sft" in page and "lr = 0.01" in page and "standard error between seeds" in page
    assert "at the start" in page
    _, states = run(grid={"lr": [1e-2, 3e-3]})
    assert states == ["sweep skipped", "after skipped", "report skipped"]
    # other options: nothing is kept, and nothing is deleted
    changed = {**OPTIONS, "data": [chats], "max_steps": 3}
    run(grid={"lr": [1e-2]}, options=changed, seeds=[0])
    archived = out / "previous-2" / "sweep" / "runs" / "lr=0.01,seed=0" / "record.json"
    assert archived.read_bytes() == record


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shards": "x/"}, "sweep.shards: expected one of its inputs model, feedback"),
        ({"training": "ftf"}, "sweep.training: expected one of pretrain"),
        ({"grid": {"lr": [-1]}}, "sweep.grid.lr: expected a positive number"),
        ({"options": {"max_steps": 2}}, "sweep.options.data: expected at least one source"),
    ],
)
def test_a_recipe_refuses_before_any_stage(base, chats, changes, message):
    with pytest.raises(InputError) as error:
        parse_recipe(recipe(base, chats, **changes))
    assert str(error.value).startswith(message)


def test_the_inputs_and_outputs_are_those_of_the_training():
    for kind, cls in TRAININGS.items():
        sweep = Sweep(kind)
        assert (sweep.inputs, sweep.outputs) == (cls.inputs, cls.outputs)
        assert sweep.metric_name in cls.validation_metrics
        assert set(cls.inputs) <= set(Sweep.inputs)
        assert replace(sweep, seeds=(7,)).inputs == cls.inputs


@pytest.mark.parametrize("training", ["reward", "grpo"])
def test_the_metrics_of_a_training_are_in_its_result(training, base, tmp_path):
    options = {**OPTIONS, "max_steps": 2, "data": [pairs(tmp_path)]}
    if training == "grpo":
        data = [{"prompt": f"what is {w}", "answer": w[0]} for w in preference_models.WORDS]
        rounds = {"prompts_per_round": 4, "num_generations": 2, "max_new_tokens": 4}
        prompts = preference_models.write(tmp_path / "prompts.jsonl", data)
        options |= {**rounds, "data": [prompts], "reward_function": "exact"}
    else:
        del options["sample_at"]  # a reward model writes no samples
    for metric in TRAININGS[training].validation_metrics:
        sweep = Sweep(training, options=options, seeds=(0,), metric=metric)
        result = sweep(tmp_path / "out", model=base)  # trains once
        assert result[metric] == result["runs"][0]["score"]
        assert ("constant_answer_score" in result["runs"][0]) == (metric == "val_score")
        ctx: Any = None  # the report needs none
        assert ("a constant answer" in sweep.report(ctx, result).facts) == (metric == "val_score")
        (output,) = sweep.outputs.values()
        assert (tmp_path / "out" / output / "config.json").is_file()


def test_a_metric_that_is_not_finite_counts_as_diverged(base, chats, tmp_path, monkeypatch):
    run = SFT.run

    def blown_up(self, ctx):
        result = run(self, ctx)
        if self.seed == 1:
            result["metrics"]["val_loss"] = math.nan
        return result

    monkeypatch.setattr(SFT, "run", blown_up)
    result = sft_sweep(chats, grid={"lr": [1e-2]}, seeds=(0, 1))(tmp_path / "out", model=base)
    (row,) = result["values"]
    assert (row["n"], row["diverged"]) == (1, 1)
    assert result["runs"][1]["error"] == "val_loss is nan"


def test_settings_of_the_options_are_in_the_folder_of_the_recipe(tmp_path):
    from fastlm.stages import load_recipe

    path, config = tmp_path / "recipe.toml", preference_models.config(300)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    path.write_text(
        'name = "r"\n[[stage]]\nkind = "sweep"\ntraining = "pretrain"\nshards = "x/"\n'
        'tokenizer = []\n[stage.options]\nconfig = "c.json"\nmax_steps = 1\n'
    )
    assert load_recipe(path).steps[0].stage.options["config"] == str(tmp_path / "c.json")
    path.write_text(
        path.read_text().replace('config = "c.json"', "") + '[stage.grid]\nconfig = ["c.json"]\n'
    )
    assert load_recipe(path).steps[0].stage.grid["config"] == [str(tmp_path / "c.json")]


def test_the_command(base, chats, tmp_path):
    options = "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in OPTIONS.items())
    words = [
        "sweep", "dpo", "--model", str(base), "--seeds", "0,1", "--metric", "val_loss",
        "--options", f"{options}, data = ['{pairs(tmp_path)}']}}", "--grid", "{lr = [1e-3]}",
        "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    entry = json.loads((tmp_path / "out" / "record.json").read_text())["stages"]["."]
    mean = f"{entry['result']['val_loss']:.4f}"
    assert f"lr = 0.001: val_loss {mean} ± " in done.stdout.replace("\n", " ")
    assert entry["kind"] == "sweep" and "model" in entry["provenance"]["ids"]
    record = read_document(tmp_path / "out" / "record.json", StageRecords).stages["."]
    assert scores(record) == {"val_loss": entry["result"]["val_loss"]}  # no seed, no lr
    sources = [source["spec"] for source in entry["provenance"]["sources"]]
    assert sources == [str(tmp_path / "pairs.jsonl")]
    wrong = CliRunner().invoke(app, [*words[:4], "--options", "{lr = 'x'}", *words[-2:]])
    assert wrong.exit_code == 2
    assert "fastlm: options.lr: expected a number, got 'x'" in wrong.stderr


def pairs(folder: Path) -> str:
    return preference_models.write(folder / "pairs.jsonl", preference_models.polite_pairs(12))
