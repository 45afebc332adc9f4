"""The stage that measures models on held-out text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastlm.errors import InputError
from fastlm.files import make_folder, save_atomic
from fastlm.runs.stage import Facts, Job, Part, Stage, Takes, at_least_one

YARDSTICKS = {"xz": "xz -9e", "zstd": "zstd -19"}


@dataclass(frozen=True)
class Eval(Stage):
    """Measure bits per byte of held-out text. xz -9e and zstd -19 compress the same text for
    comparison.
    """

    kind = "eval"
    command = ("eval",)
    version = 2
    reads = {
        "model": Takes(
            ("model", "quantized"), "Hugging Face folder, .gguf, fastlm run or model:smollm2",
            several=True, flag="m",
        ),
        "data": Takes(
            ("corpus", "shards"), "Prepared text, files of text, or a folder of token shards"
        ),
    }  # fmt: skip
    leaves = {"scores": "scores.json"}
    result = {"models": dict[str, dict[str, Any]]}

    seq_len: Annotated[int | None, "Window; default: the model's context, at most 1024"] = None
    stride: Annotated[int | None, "Tokens scored per window; default: half"] = None
    batch_size: Annotated[int, "Windows per batch"] = 32
    document_mask: Annotated[
        bool, "A token's context ends where its document begins, as in pretrain"
    ] = False

    def check(self) -> None:
        at_least_one(self, "batch_size")
        for name in ("seq_len", "stride"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}: wanted 1 or more, got {value}")

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        from fastlm.evals.texts import check_window

        for facts in inputs["model"]:
            if config := facts.get("config"):
                check_window(config.max_position_embeddings, self.seq_len, self.stride)
        return {}

    def run(self, job: Job) -> dict[str, Any]:
        from fastlm.evals.texts import text_bits_per_byte
        from fastlm.serve.chat import load_model

        (data,) = job.inputs["data"]
        models: dict[str, dict[str, Any]] = {}
        packed: dict[str, Any] = {}
        for source in job.inputs["model"]:
            model, tokenizer = load_model(source.where)
            result = text_bits_per_byte(
                model, tokenizer, data.where, seq_len=self.seq_len, stride=self.stride,
                batch_size=self.batch_size, document_mask=self.document_mask,
                compressors=not models, cache=job.cache, track=job.track, tell=job.skipped,
            )  # fmt: skip
            for key in ("bits_per_byte_xz", "bits_per_byte_zstd", "documents"):
                if key in result:
                    packed[key] = result.pop(key)
            models[source.name] = result
        scores = {**packed, "models": models}
        text = json.dumps(scores, indent=1) + "\n"
        save_atomic(make_folder(job.out) / "scores.json", lambda p: p.write_text(text, "utf-8"))
        return scores

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        del job
        values = {name: model["bits_per_byte"] for name, model in result["models"].items()}
        values |= _compressors(result)
        return "bits per byte: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items())

    def shown(self, result: Mapping[str, Any], job: Job) -> Any:
        """Return one line per number for one model, a table for several."""
        if len(result["models"]) > 1:
            return _table(result)
        (values,) = result["models"].values()
        packed = {k: v for k, v in result.items() if k != "models"}
        return "\n".join(
            f"{key}  {value:.4f}" if isinstance(value, float) else f"{key}  {value:,}"
            for key, value in {**values, **packed}.items()
        )

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        from fastlm.runs.charts import bits_chart
        from fastlm.runs.text import size_text
        from fastlm.train.metrics import METRICS, read_metrics

        models = {name: model["bits_per_byte"] for name, model in result["models"].items()}
        best = min(models, key=lambda name: models[name])
        curves = {}
        for source in job.inputs["model"]:
            metrics = source.path.parent / METRICS  # next to the model that a training wrote
            if source.name in models and metrics.is_file():
                curves[source.name] = read_metrics(metrics)
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
