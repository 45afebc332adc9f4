"""The eval stage: bits per byte of held-out text, and question sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastlm.errors import InputError
from fastlm.files import make_folder, write_json
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    ReportSection,
    Stage,
    StageContext,
    at_least_one,
    not_negative,
)

ITEMS = "items"  # folder of each model's answer to each question


@dataclass(frozen=True)
class Eval(Stage):
    """Evaluate models: bits per byte of held-out text (compared with xz -9e and zstd -19), and
    question sets (`fastlm tasks` lists them). Several models are compared with the first one on the
    same questions.
    """

    kind = "eval"
    command = ("eval",)
    version = 8
    inputs = {
        "model": InputSpec(
            ("model", "quantized"), "Hugging Face folder, .gguf, fastlm run or model:smollm2",
            several=True, flag="m",
        ),
        "data": InputSpec(
            ("corpus", "shards"), "Prepared text, files of text, or a folder of token shards",
            optional=True,
        ),
        "training_data": InputSpec(
            ("shards", "corpus"),
            "Training data to search for the questions (contamination)",
            optional=True, default=False,
        ),
    }  # fmt: skip
    outputs = {"scores": "scores.json"}
    resumable = (ITEMS,)
    result = {"models": dict[str, dict[str, Any]]}

    seq_len: Annotated[
        int | None, "Use windows of this many tokens; default: the model's context, at most 1024"
    ] = None
    stride: Annotated[int | None, "Score this many tokens per window; default: half"] = None
    batch_size: Annotated[int, "Put this many windows into a batch"] = 32
    document_mask: Annotated[bool, "Keep attention within a document, as in pretrain"] = False
    act_bits: Annotated[
        int | None, "Multiply quantized weights with activations of this many bits: 8 or 16"
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        "Ask the questions of these sets: names, abilities or all (see fastlm tasks), or YAML"
        " files of lm-evaluation-harness",
    ] = ()
    limit: Annotated[
        int | None, "Ask at most this many questions of a set, drawn at random; default: all"
    ] = None
    samples: Annotated[
        int, "Sample this many answers per free-form question (pass@k, majority@k)"
    ] = 1
    k: Annotated[
        tuple[int, ...], "Compute pass@k and majority@k for these k; default: 1, 2, 5, ..., samples"
    ] = ()
    temperature: Annotated[float, "Sample these answers at this temperature; 0 is greedy"] = 0.0
    seed: Annotated[int, "Sample questions and answers with this seed"] = 0

    def check(self) -> None:
        names = [name for name in ("limit", "seq_len", "stride") if getattr(self, name) is not None]
        at_least_one(self, "batch_size", "samples", *names)
        not_negative(self, "temperature")
        for k in self.k:
            if not 1 <= k <= self.samples:
                raise InputError(f"k: expected 1 to {self.samples} (samples), got {k}")
        if self.act_bits not in (None, 8, 16):
            raise InputError(f"act_bits: expected 8 or 16, got {self.act_bits}")
        if self.samples > 1 and not self.temperature:
            raise InputError(
                f"temperature: expected more than 0 for {self.samples} samples, got 0: all would be"
                " the same"
            )

    def digest_inputs(self, input_digest: Any) -> Any:
        from fastlm.evals.harness_tasks import is_task_file, task_files

        files = [file for name in self.tasks if is_task_file(name) for file in task_files(name)]
        return [input_digest.hash_tree(file) for file in files]

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        from fastlm.data.texts import check_window

        for facts in inputs["model"]:
            if config := facts.get("config"):
                check_window(config.max_position_embeddings, self.seq_len, self.stride)
        return {}

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.evals.contamination import contamination_report
        from fastlm.evals.registry import load_task, task_names
        from fastlm.evals.runner import run_tasks
        from fastlm.evals.scorer import Scorer
        from fastlm.evals.suite import HASH_DIGITS, compare_models, model_ids
        from fastlm.evals.text_bits_per_byte import text_bits_per_byte
        from fastlm.model.load import load_model

        data = ctx.optional("data")
        if data is None and not self.tasks:
            raise InputError("data: expected held-out text, or tasks, got neither")
        tasks = [
            load_task(name, ctx.cache_dir).sample(self.limit, self.seed)
            for name in task_names(self.tasks)
        ]
        if ctx.inputs.get("training_data") and not tasks:
            raise InputError("training_data: expected tasks with questions to search for, got none")
        overlaps: list[Any] = []
        models: dict[str, dict[str, Any]] = {}
        packed: dict[str, Any] = {}
        results_of: dict[str, Any] = {}
        ids = model_ids(ctx.inputs["model"])
        for source, model_entry in zip(ctx.inputs["model"], ids, strict=True):
            model, tokenizer = load_model(source.source, self.act_bits)
            if data is not None:
                result = text_bits_per_byte(
                    model, tokenizer, data, seq_len=self.seq_len, stride=self.stride,
                    batch_size=self.batch_size, document_mask=self.document_mask,
                    compressors=not models, cache=ctx.cache_dir, track=ctx.track,
                    on_skip=ctx.skipped,
                )  # fmt: skip
                for key in ("bits_per_byte_xz", "bits_per_byte_zstd", "documents"):
                    if key in result:
                        packed[key] = result.pop(key)
                models[source.name] = result
            if not overlaps and (training_data := ctx.optional("training_data")):
                overlaps = self._overlaps(tasks, model, tokenizer, training_data, ctx)
            if tasks:
                digits = model_entry["id"][:HASH_DIGITS]
                results_of[source.name] = run_tasks(
                    tasks, Scorer(model, tokenizer), ctx.out / ITEMS / digits,
                    model=digits + (f", act_bits {self.act_bits}" if self.act_bits else ""),
                    k=self.k, samples=self.samples, temperature=self.temperature, seed=self.seed,
                    track=ctx.track,
                )  # fmt: skip
        scores = {**packed, "models": models, "ids": ids}
        if tasks:
            scores["tasks"] = compare_models(tasks, results_of)
        for i, shares in enumerate(overlaps):
            values = {name: results[i]["values"] for name, results in results_of.items()}
            scores["tasks"][i]["contamination"] = contamination_report(tasks[i], shares, values)
        write_json(make_folder(ctx.out) / "scores.json", scores)
        return scores

    def _overlaps(
        self, tasks: Any, model: Any, tokenizer: Any, training_data: Path, ctx: StageContext
    ) -> list[Any]:
        from fastlm.data.texts import token_dataset
        from fastlm.evals.contamination import task_overlaps

        vocab_size = model.config.vocab_size
        with token_dataset(
            training_data, tokenizer, vocab_size, split="train", cache=ctx.cache_dir,
            on_skip=ctx.skipped, name="training_data",
        ) as data:  # fmt: skip
            return task_overlaps(tasks, tokenizer, data, vocab_size, track=ctx.track)

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        from fastlm.evals.report import eval_summary

        del ctx
        return eval_summary(result)

    def render(self, result: Mapping[str, Any], ctx: StageContext) -> Any:
        from fastlm.evals.report import eval_blocks, render_blocks

        del ctx
        return render_blocks(eval_blocks(result))

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        from fastlm.evals.report import eval_part

        return eval_part(ctx, result)
