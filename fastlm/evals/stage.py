"""The stage that measures models: bits per byte of held-out text, and question sets."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastlm.errors import InputError
from fastlm.files import make_folder, save_atomic
from fastlm.runs.stage import Facts, Job, Part, Stage, Takes, at_least_one

ITEMS = "items"  # the folder of what each model said to each question
HEADLINE = "bits_per_byte"
YARDSTICKS = {"xz": "xz -9e", "zstd": "zstd -19"}


@dataclass(frozen=True)
class Eval(Stage):
    """Measure models: bits per byte of held-out text (beside xz -9e and zstd -19), and question
    sets (`fastlm tasks` lists them). Several models are compared with the first on the same
    questions.
    """

    kind = "eval"
    command = ("eval",)
    version = 4
    reads = {
        "model": Takes(
            ("model", "quantized"), "Hugging Face folder, .gguf, fastlm run or model:smollm2",
            several=True, flag="m",
        ),
        "data": Takes(
            ("corpus", "shards"), "Prepared text, files of text, or a folder of token shards",
            optional=True,
        ),
        "against": Takes(
            ("shards", "corpus"),
            "Training data in which to look for the questions (contamination)",
            optional=True, default=False,
        ),
    }  # fmt: skip
    leaves = {"scores": "scores.json"}
    partial = (ITEMS,)
    result = {"models": dict[str, dict[str, Any]]}

    seq_len: Annotated[int | None, "Window; default: the model's context, at most 1024"] = None
    stride: Annotated[int | None, "Tokens scored per window; default: half"] = None
    batch_size: Annotated[int, "Windows per batch"] = 32
    document_mask: Annotated[
        bool, "A token's context ends where its document begins, as in pretrain"
    ] = False
    tasks: Annotated[
        tuple[str, ...], "Question sets: names, abilities, all, or YAML files (fastlm tasks)"
    ] = ()
    limit: Annotated[int | None, "Questions of a set, drawn at random; default: all"] = None
    samples: Annotated[int, "Answers to each question without given answers (pass@k)"] = 1
    temperature: Annotated[float, "Of such answers; 0: always the likeliest token"] = 0.0
    seed: Annotated[int, "Draws questions and answers"] = 0

    def check(self) -> None:
        at_least_one(self, "batch_size", "samples")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit: wanted 1 or more, got {self.limit}")
        if self.temperature < 0:
            raise InputError(f"temperature: wanted 0 or more, got {self.temperature}")
        if self.samples > 1 and not self.temperature:
            raise InputError(
                f"temperature: wanted more than 0 for {self.samples} samples, got 0: all would be"
                " the same"
            )
        for name in ("seq_len", "stride"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}: wanted 1 or more, got {value}")

    def contents(self, contents: Any) -> Any:
        from fastlm.evals.catalog import is_file
        from fastlm.evals.own.task import task_files

        files = [file for name in self.tasks if is_file(name) for file in task_files(name)]
        return [contents.tree(file) for file in files]

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        from fastlm.evals.texts import check_window

        for facts in inputs["model"]:
            if config := facts.get("config"):
                check_window(config.max_position_embeddings, self.seq_len, self.stride)
        return {}

    def run(self, job: Job) -> dict[str, Any]:
        from fastlm.serve.chat import load_model

        data = job.optional("data")
        if data is None and not self.tasks:
            raise InputError("data: wanted held-out text, or tasks, got neither")
        tasks = self._tasks(job)
        if job.inputs.get("against") and not tasks:
            raise InputError("against: wanted tasks whose questions to look for, got none")
        overlaps: list[Any] = []
        models: dict[str, dict[str, Any]] = {}
        packed: dict[str, Any] = {}
        asked: dict[str, Any] = {}
        for source in job.inputs["model"]:
            model, tokenizer = load_model(source.where)
            if data is not None:
                result = self._bits(model, tokenizer, data, job, first=not models)
                for key in ("bits_per_byte_xz", "bits_per_byte_zstd", "documents"):
                    if key in result:
                        packed[key] = result.pop(key)
                models[source.name] = result
            if not overlaps and (against := job.optional("against")):
                overlaps = self._overlaps(tasks, model, tokenizer, against, job)
            if tasks:
                asked[source.name] = self._ask(tasks, model, tokenizer, source, job)
        scores = {**packed, "models": models}
        if tasks:
            from fastlm.evals.suite import measured
            from fastlm.evals.tables import latex

            scores["tasks"] = measured(tasks, asked)
            for i, found in enumerate(overlaps):
                from fastlm.evals.contamination import told

                values = {name: results[i]["values"] for name, results in asked.items()}
                scores["tasks"][i]["contamination"] = told(tasks[i], found, values)
            table = latex(scores["tasks"])
            save_atomic(make_folder(job.out) / "scores.tex", lambda p: p.write_text(table, "utf-8"))
        text = json.dumps(scores, indent=1) + "\n"
        save_atomic(make_folder(job.out) / "scores.json", lambda p: p.write_text(text, "utf-8"))
        return scores

    def _bits(
        self, model: Any, tokenizer: Any, data: Path, job: Job, *, first: bool
    ) -> dict[str, Any]:
        from fastlm.evals.texts import text_bits_per_byte

        return text_bits_per_byte(
            model, tokenizer, data, seq_len=self.seq_len, stride=self.stride,
            batch_size=self.batch_size, document_mask=self.document_mask, compressors=first,
            cache=job.cache, track=job.track, tell=job.skipped,
        )  # fmt: skip

    def _overlaps(
        self, tasks: Any, model: Any, tokenizer: Any, against: Path, job: Job
    ) -> list[Any]:
        from fastlm.evals.contamination import task_overlaps
        from fastlm.evals.texts import token_dataset

        with token_dataset(
            against, tokenizer, model.config.vocab_size, part="train", cache=job.cache,
            tell=job.skipped,
        ) as data:  # fmt: skip
            return task_overlaps(tasks, tokenizer, data, track=job.track)

    def _tasks(self, job: Job) -> list[Any]:
        from fastlm.evals.catalog import load_task, names_of

        return [
            load_task(name, job.cache).sample(self.limit, self.seed)
            for name in names_of(self.tasks)
        ]

    def _ask(
        self, tasks: Any, model: Any, tokenizer: Any, source: Any, job: Job
    ) -> list[dict[str, Any]]:
        from fastlm.evals.scorer import Scorer
        from fastlm.evals.suite import ask_all, hash_of

        hashed = hash_of(source.where)
        return ask_all(
            tasks, Scorer(model, tokenizer), job.out / ITEMS / f"{hashed}", model=hashed,
            samples=self.samples, temperature=self.temperature, seed=self.seed, track=job.track,
        )  # fmt: skip

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        del job
        values = {name: model["bits_per_byte"] for name, model in result["models"].items()}
        values |= _compressors(result)
        told = []
        if values:
            told.append("bits per byte: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        if tasks := result.get("tasks"):
            questions = sum(task["questions"] for task in tasks)
            told.append(f"{len(tasks)} question sets, {questions:,} questions")
        return "; ".join(told)

    def shown(self, result: Mapping[str, Any], job: Job) -> Any:
        """Return one line per number for one model, a table for several and for tasks."""
        if tasks := result.get("tasks"):
            from rich.console import Group

            from fastlm.evals.tables import compared_table, task_table
            from fastlm.evals.tables_of_parts import contamination_table, part_table

            parts = [_table(result)] if result["models"] else []
            parts.append(task_table(tasks))
            parts += [t for make in (part_table, contamination_table) if (t := make(tasks))]
            if any(task["compared"] for task in tasks):
                parts.append(compared_table(tasks))
            return Group(*parts)
        if len(result["models"]) > 1 or any("domains" in m for m in result["models"].values()):
            return _table(result)
        (values,) = result["models"].values()
        packed = {k: v for k, v in result.items() if k != "models"}
        return "\n".join(
            f"{key}  {value:.4f}" if isinstance(value, float) else f"{key}  {value:,}"
            for key, value in {**values, **packed}.items()
        )

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        part = _bits_part(job, result) if result["models"] else Part("How well it answers")
        if tasks := result.get("tasks"):
            _add_tasks(part, tasks)
        return part


def _bits_part(job: Job, result: Mapping[str, Any]) -> Part:
    from fastlm.runs.charts import bits_chart
    from fastlm.runs.text import size_text
    from fastlm.train.metrics import METRICS, read_metrics

    models = {name: model["bits_per_byte"] for name, model in result["models"].items()}
    best = min(models, key=lambda name: models[name])
    curves = {}
    for source in job.inputs["model"]:
        metrics = source.path.parent / METRICS  # next to the model that a training wrote
        if source.name in models and metrics.is_file():
            rows = read_metrics(metrics)
            if any("bits_per_byte" in row for row in rows):  # a fine-tuning has none
                curves[source.name] = rows
    packed = _compressors(result)
    of = "" if len(models) == 1 else f" ({best})"
    card = f"bits per byte of unseen text{of}"
    if packed:
        gain = 100 * (1 - models[best] / packed["xz -9e"])
        card += f", {abs(gain):.0f} % {'below' if gain >= 0 else 'above'} xz -9e"
    size = next(iter(result["models"].values()))["bytes"]
    documents = f"{result['documents']:,} held-out documents, " if "documents" in result else ""
    note = (
        f"{documents}{size_text(size)}. Bits per byte is what a compressor built on the model"
        " would need; lower is better."
    )
    if packed:
        note += " xz and zstd compress the same text. A bar is the difference to xz."
    return Part(
        "How well it predicts text it has never seen",
        note,
        charts=[bits_chart(curves, models, packed)] if curves else [],
        cards=[(f"{models[best]:.3f}", card)],
        template="eval.html.jinja",
        values={"bars": bars(models, packed)},
    )


def _add_tasks(part: Part, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Add question sets to a part of the report."""
    from fastlm.evals.charts import differences_chart, scores_chart
    from fastlm.evals.tables import COMPARED, HEADINGS, compared_lines, lines, shown_columns
    from fastlm.evals.tables_of_parts import (
        CONTAMINATION,
        PARTS,
        contamination_lines,
        part_lines,
    )

    rows = list(lines(tasks))
    columns = shown_columns(rows)
    compared = list(compared_lines(tasks))
    # title, note, headings (text, whether it is on the left), rows
    tables = [
        (
            "Parts of the sets", "", [(name, i < 3) for i, name in enumerate(PARTS)],
            list(part_lines(tasks)),
        ),
        (
            "Are the questions in the training text?",
            "Touched: 13 tokens in a row of the question and its right answer stand there. Dirty:"
            " such runs cover 80 % of its tokens.",
            [(name, i < 2) for i, name in enumerate(CONTAMINATION)],
            list(contamination_lines(tasks)),
        ),
    ]  # fmt: skip
    charts = [scores_chart(tasks)]
    if any(one["measure"] == HEADLINE for task in tasks for one in task["compared"]):
        charts.append(differences_chart(tasks))
    part.template, part.wide = "eval.html.jinja", True
    part.title = "How well it predicts text, and answers questions"
    part.values = {
        **part.values,
        "headings": [(HEADINGS[key], key in ("set", "model")) for key in columns],
        "rows": [[row[key] for key in columns] for row in rows],
        "compared_headings": [(name, i < 3) for i, name in enumerate(COMPARED)],
        "compared": compared,
        "task_charts": charts,
        "tables": [table for table in tables if table[-1]],
        "sources": [
            {key: task[key] for key in ("name", "format", "hash", "source", "licence")}
            for task in tasks
        ],
    }
    questions = sum(task["questions"] for task in tasks)
    part.cards = [*part.cards, (f"{questions:,}", f"questions of {len(tasks)} sets answered")]


def _compressors(result: Mapping[str, Any]) -> dict[str, float]:
    """Return compressor -> bits per byte, {} if shards were measured."""
    return {
        name: result[f"bits_per_byte_{key}"]
        for key, name in YARDSTICKS.items()
        if f"bits_per_byte_{key}" in result
    }


def _table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table("model", box=None)
    for heading in ("bits per byte", "loss", "tokens", "window"):
        table.add_column(heading, justify="right")
    for name, v in result["models"].items():
        table.add_row(
            name, f"{v['bits_per_byte']:.4f}", f"{v['loss']:.4f}", f"{v['tokens']:,}",
            f"{v['seq_len']:,}",
        )  # fmt: skip
        for domain, own in v.get("domains", {}).items():
            table.add_row(
                f"  {domain}", f"{own['bits_per_byte']:.4f}", "", f"{own['tokens']:,}", ""
            )
    for name, value in _compressors(result).items():
        table.add_row(name, f"{value:.4f}", "", "", "")
    return table


def bars(models: Mapping[str, float], packed: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return bits per byte of the compressors and the models, as bars of the difference to xz.

    Bars left of xz's line need fewer bits, bars right of it more. Bars from zero would be nearly
    equal. Without xz, the first model is the line.
    """
    line = packed.get("xz -9e", next(iter(models.values())))
    rows = [*sorted(packed.items(), key=lambda kv: kv[0], reverse=True), *models.items()]
    values = [value for _, value in rows]
    least, most = min(values), max(values)
    span = max(most - least, 0.1 * line)  # negligible differences stay short
    return [
        {
            "name": name, "value": value, "model": name in models,
            "change": 100 * (value / line - 1), "left": 100 * (min(value, line) - least) / span,
            "width": 100 * abs(value - line) / span, "line": 100 * (line - least) / span,
        }
        for name, value in rows
    ]  # fmt: skip
