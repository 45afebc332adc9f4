"""The stage that trains once per seed and per value of some options, and compares the values.

Each run is a training in its own folder, with the record of a stage that runs alone. A sweep that
was interrupted, or has more values or seeds than before, keeps the finished runs. Rejected: runs in
parallel, because one training uses all cores or the whole GPU; random search and early stopping of
bad runs, whose remaining seeds would give no error.
"""

import itertools
import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastlm.errors import InputError, unknown_key
from fastlm.files import make_folder, read_text, save_atomic, write_text
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    Positional,
    ReportSection,
    Stage,
    StageContext,
    one_of,
    options_of,
)
from fastlm.schema import read_document, validate
from fastlm.sources.input_digest import InputDigest
from fastlm.torchrun import check_single_process
from fastlm.train.distill import Distill
from fastlm.train.dpo import DPO
from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.online_stage import CONSTANT_ANSWER_SCORE, GRPO, PPO
from fastlm.train.options import expect
from fastlm.train.pretrain import Pretrain
from fastlm.train.reward import Reward
from fastlm.train.sft import SFT
from fastlm.train.training_stage import MODEL, TrainingStage

if TYPE_CHECKING:
    from fastlm.pipeline.record import StageRecord

T = TypeVar("T")
TRAININGS: dict[str, type[TrainingStage]] = {
    cls.kind: cls for cls in (Pretrain, SFT, Distill, Reward, DPO, PPO, GRPO)
}
RUNS = "runs"  # a folder per run
FINGERPRINT = "fingerprint"  # of the options and inputs that a run began with
SETTINGS = ("config", "chat_template")  # options of trainings that name a file of settings
NONE = "-"  # in a table
PLAIN = re.compile(r"[\w.+-]{1,40}")  # a value that can be part of the name of a folder


@dataclass(frozen=True)
class SweepRun:
    """One training of a sweep. ``values``: of the options in the grid."""

    values: Mapping[str, Any]
    seed: int
    stage: TrainingStage

    @property
    def name(self) -> str:
        """The name of its folder."""
        return ",".join(f"{k}={_name_of(v)}" for k, v in {**self.values, "seed": self.seed}.items())


def _name_of(value: Any) -> str:
    from fastlm.pipeline.provenance import json_hash

    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if PLAIN.fullmatch(text) else json_hash(value)[:12]


def _inputs() -> dict[str, InputSpec]:
    """Return the inputs of all trainings. A sweep has those of its own one."""
    specs = {key: spec for cls in TRAININGS.values() for key, spec in cls.inputs.items()}
    specs["model"] = replace(specs["model"], help="Model to train: a run or a Hugging Face folder")
    return {key: replace(spec, optional=True) for key, spec in specs.items()}


@dataclass(frozen=True)
class Sweep(Stage):
    """Run a training once per seed and per combination of values of some options, and compare them.

    The values are compared by the mean of a validation metric over the seeds, with the error
    between seeds. The output is the model of the best run of the best value. The same command run
    again keeps the finished runs; so does one with more values or seeds. A run that diverges is
    reported, and the sweep continues.
    """

    kind = "sweep"
    command = ("sweep",)
    inputs = _inputs()
    outputs = {"model": MODEL}
    checkpoints = (RUNS,)
    result = {"metric": str, "best": str, "values": list, "runs": list}
    notes = """The tables are inline tables of TOML: fastlm sweep sft --model base --options
'{data = ["chats.jsonl"], max_steps = 100}' --grid '{lr = [1e-4, 3e-4]}' --seeds 0,1,2 -o out"""
    sources_in = ("data",)
    settings_in = tuple(f"{t}.{key}" for t in ("options", "grid") for key in SETTINGS)
    kind_in = "training"

    training: Annotated[str, Positional(f"Run this training: {', '.join(TRAININGS)}")]
    options: Annotated[dict[str, Any], "Give every run these options, a table"] = field(
        default_factory=dict
    )
    grid: Annotated[
        dict[str, list[Any]], "Run every combination of these values, a table: option -> list"
    ] = field(default_factory=dict)
    seeds: Annotated[tuple[int, ...], "Run every combination with each of these seeds"] = (0, 1, 2)
    metric: Annotated[
        str,
        "Compare by this validation metric; default: val_loss, val_accuracy (reward, dpo) or"
        " val_score (ppo, grpo)",
    ] = ""

    def __post_init__(self) -> None:
        one_of(self, training=TRAININGS)
        # those of the training; the class has those of all trainings
        object.__setattr__(self, "inputs", self.cls.inputs)
        object.__setattr__(self, "outputs", self.cls.outputs)

    @property
    def cls(self) -> type[TrainingStage]:
        return TRAININGS[self.training]

    @property
    def metric_name(self) -> str:
        return self.metric or next(iter(self.cls.validation_metrics))

    @property
    def greater_is_better(self) -> bool:
        return self.cls.validation_metrics[self.metric_name]

    @property
    def data(self) -> tuple[str, ...]:
        """The sources of all runs."""
        sources = (getattr(run.stage, name) for run in self.runs() for name in self.cls.sources_in)
        return tuple(dict.fromkeys(itertools.chain.from_iterable(sources)))

    def combinations(self) -> list[dict[str, Any]]:
        """Return the combinations of the grid's values."""
        return [dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())]

    def runs(self) -> list[SweepRun]:
        """Return the runs, in their order: the seeds of the first combination first."""
        return [
            SweepRun(values, seed, self.stage(values, seed))
            for values in self.combinations()
            for seed in self.seeds
        ]

    def stage(self, values: Mapping[str, Any], seed: int) -> TrainingStage:
        """Return the training of one run."""
        with_seed = {**self.options, **values, "seed": seed}
        return self.located(partial(validate, with_seed, self.cls, "", extra="forbid"))

    def located(self, function: Callable[[], T]) -> T:
        """Call ``function``. Its InputErrors about options get the name of the option's table."""
        try:
            return function()
        except InputError as error:
            name, colon, text = str(error).partition(":")
            first = name.partition(",")[0].partition("[")[0].partition(".")[0]
            if first not in {option.name for option in options_of(self.cls)}:
                raise
            table = "grid." if first in self.grid else "options."
            name = "seeds" if name == "seed" else f"{table}{name}"
            raise InputError(f"{name}{colon}{text}") from None

    def check(self) -> None:
        names = [option.name for option in options_of(self.cls) if option.name != "seed"]
        for table in ("options", "grid"):
            for key in getattr(self, table):
                expect(key != "seed", f"{table}.seed", "the seeds in the option seeds", "this key")
                if key not in names:
                    raise InputError(unknown_key(f"{table}.{key}", key, names))
        for key, values in self.grid.items():
            expect(key not in self.options, f"grid.{key}", "no value in options too", "one")
            _each_once(f"grid.{key}", values)
        _each_once("seeds", self.seeds)
        if self.metric:
            one_of(self, metric=self.cls.validation_metrics)
        for run in self.runs():
            self.located(partial(self.check_run, run.stage))
        folders = [run.name for run in self.runs()]
        _each_once("grid", folders)

    def check_run(self, stage: TrainingStage) -> None:
        """Refuse options of a run that cannot work, or give no validation metric."""
        stage.check()
        reason = f"for {self.metric_name}"
        expect(stage.validations >= 1, "validations", f"1 or more, {reason}", stage.validations)
        heldout = getattr(stage, "heldout", None)
        expect(heldout is None or heldout > 0, "heldout", f"a share above 0, {reason}", heldout)

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        facts = [self.located(partial(run.stage.plan, inputs)) for run in self.runs()]
        first, *others = facts
        return {k: v for k, v in first.items() if all(f.get(k) == v for f in others)}

    def identity(self) -> dict[str, Any]:
        return {**asdict(self), "training_version": self.cls.version}

    def can_continue(self, changed: Collection[str], folder: Path, finished: bool) -> bool:
        return set(changed) <= {"grid", "seeds", "metric"}  # the other runs stay valid

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        seed = self.seeds[0]
        stages = [self.stage(values, seed) for values in self.combinations()]
        digests = [stage.digest_inputs(input_digest) for stage in stages]
        # each once: a further value changes them only if it names another file
        return [*{json.dumps(digest, default=str): digest for digest in digests}.values()]

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.train.objective import DivergedError
        from fastlm.train.sweep_statistics import best_value, compare_values

        check_single_process("sweep", "start its trainings one by one")
        input_digest = InputDigest(ctx.out / "sources.json", cache=ctx.cache_dir)
        runs, rows = self.runs(), []
        for number, run in enumerate(runs, 1):
            ctx.info(f"run {number} of {len(runs)}: {run.name}")
            rows.append(self.row(run, ctx, input_digest))
        size = len(self.seeds)
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        scores = [{r["seed"]: r["score"] for r in group if "score" in r} for group in groups]
        failures = [sum("error" in row for row in group) for group in groups]
        best = best_value(scores, failures, self.greater_is_better)
        if best is None:
            raise DivergedError(
                f"all {len(rows)} runs diverged; {runs[0].name}: {rows[0]['error']}"
            )
        choose = max if self.greater_is_better else min
        best_row = choose((r for r in groups[best] if "score" in r), key=lambda r: r["score"])
        source = ctx.out / RUNS / best_row["name"] / MODEL
        save_atomic(ctx.out / MODEL, partial(shutil.copytree, source))
        summaries = compare_values(scores, best)
        return {
            "metric": self.metric_name,
            "greater_is_better": self.greater_is_better,
            self.metric_name: summaries[best].mean,
            "best": best_row["name"],
            "values": [
                {"values": values, "diverged": failed, **asdict(summary)}
                for values, failed, summary in zip(self.combinations(), failures, summaries)
            ],
            "runs": rows,
            "used_seconds": sum(row["seconds"] for row in rows),
        }

    def row(self, run: SweepRun, ctx: StageContext, input_digest: InputDigest) -> dict[str, Any]:
        """Train a run, unless its folder has the record of it. Return its entry of the result."""
        from fastlm.pipeline.provenance import describe, json_hash
        from fastlm.pipeline.record import RECORD, StageRecords, changed_options, record_stage
        from fastlm.train.objective import DivergedError

        stage, folder = run.stage, ctx.out / RUNS / run.name
        inner = replace(ctx, name=run.name, out=folder, in_recipe=False)
        now = describe(stage, inner, {}, input_digest)
        ids = {key: [record["id"] for record in records] for key, records in now.inputs.items()}
        state = [stage.kind, stage.version, changed_options(stage), ids, now.sources]
        fingerprint = json_hash([*state, stage.digest_inputs(input_digest)])
        mark = folder / FINGERPRINT
        if not mark.is_file():
            make_folder(folder)
            write_text(mark, fingerprint)
        expect(
            read_text(mark) == fingerprint, "out",
            "a new folder, or one of a sweep with the same options and inputs",
            f"{folder} with others",
        )  # fmt: skip
        if not (folder / RECORD).is_file():
            start = time.perf_counter()
            try:
                result = stage.run(inner)
            except DivergedError as error:
                result = {"error": " ".join(str(error).split())}
            except InputError as error:
                raise InputError(f"{run.name}: {error}") from error
            record_stage(stage, inner, result, time.perf_counter() - start)
        entry = read_document(folder / RECORD, StageRecords, extra="forbid").stages["."]
        return self.row_of(run, folder, entry, ctx)

    def row_of(
        self, run: SweepRun, folder: Path, entry: "StageRecord", ctx: StageContext
    ) -> dict[str, Any]:
        result = entry.result or {}
        row = {
            "name": run.name, "values": dict(run.values), "seed": run.seed,
            "seconds": max(entry.seconds or 0.0, result.get("used_seconds", 0.0)),
        }  # fmt: skip
        name = self.metric_name
        error, score = result.get("error"), result.get("metrics", {}).get(name)
        if error is None and score is None:
            raise InputError(f"metric: expected {name} on held-out data, got none in {run.name}")
        if error is None and not math.isfinite(score):  # the last update went too far
            error = f"{name} is {score}"
        if error is not None:
            ctx.warning(f"{run.name} diverged: {error}")
            return row | {"error": error}
        if (constant := result.get(CONSTANT_ANSWER_SCORE)) is not None:
            row[CONSTANT_ANSWER_SCORE] = constant
        return row | {"score": score, "curve": _curve(folder, name)}

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        best = best_run(result)
        row = next(row for row in result["values"] if row["values"] == best["values"])
        parts = [f"{values_text(row['values'])}: {result['metric']} {mean_text(row)}"]
        if len(result["values"]) > 1:
            parts.append(f"the best of {len(result['values'])} values")
        if diverged := sum(row["diverged"] for row in result["values"]):
            parts.append(f"{diverged} of {len(result['runs'])} runs diverged")
        return f"{', '.join(parts)}; the model of {best['name']}: {ctx.out / MODEL}"

    def render(self, result: Mapping[str, Any], ctx: StageContext) -> Any:
        from rich.console import Group
        from rich.table import Table

        metric = result["metric"]
        table = Table(
            "values", metric, "95 %", "seeds", "minus the best", "p", "diverged", box=None
        )
        for row in result["values"]:
            table.add_row(*cells(row))
        return Group(table, self.summary(result, ctx))

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        from fastlm.train.charts import sweep_chart

        curves: dict[str, list[Any]] = {}
        for row in result["runs"]:
            if "curve" in row:
                curves.setdefault(values_text(row["values"]), []).append(row["curve"])
        best, name = best_run(result), result["metric"]
        starts = [curve[0][1] for group in curves.values() for curve in group if curve[0][0] == 0]
        constants = {row.get(CONSTANT_ANSWER_SCORE) for row in result["runs"] if "score" in row}
        constant = constants.pop() if len(constants) == 1 else None  # that of all runs
        better = "higher" if result["greater_is_better"] else "lower"
        return ReportSection(
            f"Sweep of {self.training}",
            f"Mean {name} over the seeds (the {better}, the better) ± standard error between seeds;"
            " p is adjusted for all pairs of values (Holm). The model is that of the best run of"
            " the best value; its own score is the best of several, so measure it on other data.",
            facts={
                "seeds": ", ".join(map(str, self.seeds)),
                **({"at the start": f"{name} {statistics.mean(starts):.4f}"} if starts else {}),
                **({} if constant is None else {"a constant answer": f"{name} {constant:.4f}"}),
                "best run": f"{best['name']}, {name} {best['score']:.4f}",
                **{f"{row['name']} diverged": row["error"] for row in result["runs"]
                   if "error" in row},
            },
            charts=[sweep_chart(curves, f"held-out {name}")],
            cards=[(f"{result[name]:.4f}", f"{name} of {values_text(best['values'])}")],
            template="sweep.html.jinja",
            values={"metric": name, "rows": [cells(row) for row in result["values"]]},
        )  # fmt: skip


def best_run(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of the run whose model is the output."""
    return next(row for row in result["runs"] if row["name"] == result["best"])


def _each_once(name: str, values: Sequence[Any]) -> None:
    expect(values, name, "at least one value", "none")
    texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
    expect(len({*texts}) == len(texts), name, "each value once", ", ".join(texts))


def _curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return (tokens seen, metric) of each validation."""
    tokens, points = {0: 0}, []
    for line in read_metrics(folder / METRICS):
        if "loss" in line:
            tokens[line["step"]] = line["tokens"]
        if name in line:
            points.append((tokens[line["step"]], line[name]))
    return points


def values_text(values: Mapping[str, Any]) -> str:
    """Return the values of one combination, for people."""
    return ", ".join(f"{key} = {value}" for key, value in values.items()) or "all runs"


def mean_text(row: Mapping[str, Any]) -> str:
    """Return a mean over seeds with its error."""
    if row["mean"] is None:
        return NONE
    error = "" if row["error"] is None else f" ± {row['error']:.2g}"
    return f"{row['mean']:.4f}{error}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of the row of a value, in the table of the command and of the report."""
    low, high, difference, p = (row[key] for key in ("low", "high", "difference", "p"))
    return [
        values_text(row["values"]),
        mean_text(row),
        NONE if low is None else f"{low:.4f} to {high:.4f}",
        str(row["n"]),
        NONE if difference is None else f"{difference:+.4f}",
        NONE if p is None else f"{p:.3f}",
        str(row["diverged"]),
    ]
