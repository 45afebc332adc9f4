"""The base classes of all stages that train. `TrainingStage` has the loop, the outputs, the result
and the report; `ChatStage` the options of stages on rows of text (conversations, preferences,
prompts), and how they load the model and the rows.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from fastlm.data.conversations import FORMATS
from fastlm.errors import InputError
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    MaybePositional,
    ReportSection,
    Stage,
    StageContext,
    at_least_one,
    not_negative,
    one_of,
    positive,
)
from fastlm.sources.input_digest import InputDigest
from fastlm.torchrun import is_main_process
from fastlm.train.encoding import EncodedDataset, chat_tokenizer
from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.objective import weights_digest
from fastlm.train.options import OPTIMIZERS, TrainOptions, expect

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.objective import DivergedError, Objective

MODEL = "model"
FEEDBACK = InputSpec(
    ("feedback",), "The output of `fastlm feedback build`, in addition to the data", optional=True
)
MAX_LENGTH = (
    2048  # default maximum tokens of a conversation; bounds memory where the context is longer
)


@dataclass
class TrainingSetup:
    """The model, data and options of a training that is ready to run.

    ``model``: the model to save. ``source``: the folder of the initial model. ``facts``: entries of
    the result about the data and the model. ``on_diverged``: see `fastlm.train.loop.train`.
    """

    model: Any
    tokenizer: "Tokenizer | None"
    objective: "Objective"
    options: TrainOptions
    facts: dict[str, Any]
    source: Path | None = None
    on_diverged: "Callable[[DivergedError], Any] | None" = None


@dataclass(frozen=True)
class TrainingStage(TrainOptions, Stage):
    """A stage that trains a model. A subclass defines `prepare`, `section`, and perhaps
    `summary_parts`.

    Class attributes:
        validation_metrics: the metrics of the result by which runs are compared -> whether more is
            better. The first is the default.
    """

    outputs = {"model": MODEL}
    validation_metrics: ClassVar[Mapping[str, bool]] = {"val_loss": False}
    checkpoints = ("checkpoints",)
    result = {
        "steps": int, "tokens": int, "tokens_per_second": float, "loss": float | None,
        "metrics": dict, "parameters": int, "used_seconds": float, "machine_load": str,
    }  # fmt: skip

    seed: Annotated[int, "Seed the data order and the sampling with this"] = 0

    def check(self) -> None:
        super().check()
        not_negative(self, "seed")

    def prepare(self, ctx: StageContext) -> TrainingSetup:
        """Load the model and read the data."""
        raise NotImplementedError

    def finish(self, training: TrainingSetup) -> dict[str, Any]:
        """Return entries of the result about the trained model, before it is saved."""
        return {}

    def save_trained(self, model: Any, folder: Path, source: Path | None) -> None:
        """Write the model to ``folder``. ``source``: the folder of the initial model."""
        model.save_pretrained(folder)

    def save(self, training: TrainingSetup, folder: Path) -> None:
        """Write the model and its tokenizer."""
        self.save_trained(training.model, folder, training.source)
        if training.tokenizer is not None:
            training.tokenizer.save(folder)

    def run(self, ctx: StageContext) -> dict[str, Any]:
        import torch

        from fastlm.train.loop import train

        training = self.prepare(ctx)
        torch.manual_seed(self.seed)
        load = os.getloadavg()[0]
        result = train(
            training.objective, training.options, ctx.out, track=ctx.track,
            on_event=ctx.on_event, on_diverged=training.on_diverged,
        )  # fmt: skip
        if not is_main_process():
            return {}
        trained = asdict(result)
        trained["used_seconds"] = trained.pop("seconds")  # of all sessions
        now = os.getloadavg()[0]
        trained["machine_load"] = f"{load:.1f} at the start, {now:.1f} at the end"
        metrics = self.finish(training)
        self.save(training, ctx.out / MODEL)
        return {**trained, **training.facts, **metrics}

    def summary_parts(self, result: Mapping[str, Any], ctx: StageContext) -> tuple[str, list[str]]:
        """Return the amount of data and the final figures, for the summary."""
        return "", [loss_text(result), f"{result['tokens_per_second']:,.0f} tokens/s"]

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        data, figures = self.summary_parts(result, ctx)
        parts = [*([data] if data else []), f"{result['steps']} steps", *figures]
        if self.keep == "best":
            name = "val_loss" if "val_loss" in result["metrics"] else "val_score"
            value = result["metrics"][name]
            parts.append(f"weights of step {result['best_step']} with {name} {value:.4f}")
        return f"{', '.join(parts)}: {ctx.out / MODEL}"

    def section(
        self, ctx: StageContext, result: Mapping[str, Any], metrics: list[dict[str, Any]]
    ) -> ReportSection:
        """Return the stage's section of report.html, without what `report` adds for all stages."""
        raise NotImplementedError

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        from fastlm.pipeline.text import seconds_text
        from fastlm.train.charts import training_charts

        metrics = read_metrics(ctx.out / METRICS)
        section = self.section(ctx, result, metrics)
        section.charts = [*section.charts, *training_charts(metrics)]
        section.facts = {
            **section.facts,
            "schedule": f"{OPTIMIZERS[self.optimizer]}, {self.schedule}, peak {self.lr},"
            f" weight decay {self.weight_decay}, {self.dtype}",
            "time": f"{seconds_text(result['used_seconds'])}, steps and checkpoints",
            "machine load": result["machine_load"],
        }
        if section.template == ReportSection.template:
            section.template = "training.html.jinja"
            samples = [m for m in metrics if "sample" in m]
            section.values = {"samples": samples, "caption": self.samples_caption(result)}
        return section

    def samples_caption(self, result: Mapping[str, Any]) -> str:
        """Return the caption of the report's samples: prompt and sampling."""
        return f"Answers to “{shorten(result['prompt'], 200)}”, at temperature 0."


def loss_text(result: Mapping[str, Any]) -> str:
    """Return the loss, for the summary."""
    return "no loss" if result["loss"] is None else f"loss {result['loss']:.4f}"


@dataclass(frozen=True)
class ChatStage(TrainingStage):
    """A training on rows that the model's chat template renders. A subclass defines `read_data`,
    `data_facts` and `objective`.
    """

    truncations: ClassVar[tuple[str, ...]] = ("skip", "truncate")  # values of `truncation`
    result = {
        **TrainingStage.result, "trained_parameters": int, "heldout": int, "rows_read": int,
        "counts": dict, "prompt": str,
    }  # fmt: skip
    row_name: ClassVar[str] = "conversations"  # of `data`
    row_use: ClassVar[str] = "learn from"
    sources_in: ClassVar[tuple[str, ...]] = ("data",)
    settings_in: ClassVar[tuple[str, ...]] = ("chat_template",)
    instructs: ClassVar[bool] = True
    feedback_format: ClassVar[str] = "sft"  # of `fastlm.feedback.build.FORMS`

    data: Annotated[
        tuple[str, ...],
        MaybePositional(
            "Read rows from .jsonl or .json files, folders, pypi:, sdist: or deb:NAME#GLOB"
        ),
    ] = ()
    epochs: Annotated[
        float | None,
        "Pass over the data this many times; default: 1, if no other option ends the training",
    ] = None
    batch_size: Annotated[
        int, "Join this many conversations into a micro-batch, without padding"
    ] = 8
    max_length: Annotated[
        int | None, "Limit an example to this many tokens; default: the context, at most 2048"
    ] = None
    truncation: Annotated[str, "Handle longer examples this way: skip or truncate"] = "skip"
    skip_bad: Annotated[bool, "Skip and count invalid rows instead of stopping at the first"] = (
        False
    )
    date: Annotated[str, "Give chat templates this as today's date, YYYY-MM-DD"] = "2024-07-26"
    heldout: Annotated[float, "Hold out this share of the data"] = 0.05
    chat_template: Annotated[
        str,
        "Use this Jinja file as chat template; default: the template of the model, or else ChatML",
    ] = ""
    lr: Annotated[float, "Warm up to this peak learning rate"] = 2e-5
    warmup_ratio: Annotated[float, "Warm up the learning rate over this share of the run"] = 0.03
    weight_decay: Annotated[float, "Apply this weight decay to matrices"] = 0.0
    validations: Annotated[int, "Validate this many times, evenly spaced over the run"] = 4
    sample_at: Annotated[
        tuple[float, ...], "Let the model answer a prompt at these points of the run, 0 to 1"
    ] = (0.0, 0.5, 1.0)
    sample_prompt: Annotated[str, "Answer this message in samples; default: a held-out prompt"] = ""

    def check(self) -> None:
        at_least_one(self, "batch_size", "gradient_accumulation_steps")
        expect(
            self.max_length is None or self.max_length >= 2,
            "max_length",
            "2 or more",
            self.max_length,
        )
        positive(self, "epochs")
        self.train_options(1).check()
        expect(0 <= self.heldout < 1, "heldout", "a share in [0, 1)", self.heldout)
        one_of(self, truncation=self.truncations)
        try:
            day = date.fromisoformat(self.date).isoformat()
        except ValueError:
            day = ""
        expect(day == self.date, "date", "YYYY-MM-DD", repr(self.date))
        not_negative(self, "seed")

    def train_options(self, examples: int) -> TrainOptions:
        """Return the options of the loop, with `epochs` as a number of steps."""
        options = self.loop_options()
        epochs = self.epochs
        if epochs is None and not (self.max_steps is self.max_seconds is self.max_tokens is None):
            return options
        steps = self.steps_of_epochs(epochs or 1.0, examples)
        max_steps = steps if self.max_steps is None else min(steps, self.max_steps)
        return replace(options, max_steps=max_steps)

    def step_size(self) -> int:
        """Return the rows of a step, of all its micro-batches."""
        return self.batch_size * self.gradient_accumulation_steps

    def steps_of_epochs(self, epochs: float, examples: int) -> int:
        """Return the number of steps of ``epochs`` passes over the examples. InputError:
        `batch_warmup`, on which that number would depend.
        """
        expect(
            not self.batch_warmup, "batch_warmup",
            "0 where epochs end the training (max_tokens or max_steps do without)",
            self.batch_warmup,
        )  # fmt: skip
        batches = math.ceil(examples / self.batch_size)
        return math.ceil(epochs * math.ceil(batches / self.gradient_accumulation_steps))

    def example_length(self, context: int) -> int:
        """Return the maximum tokens of an example, for a model with this context."""
        length = self.max_length or min(context, MAX_LENGTH)
        expect(length <= context, "max_length", f"at most the model's context {context}", length)
        return length

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_data(bool(inputs.get("feedback")))
        return inputs["model"][0]

    def check_data(self, feedback: bool) -> None:
        """Raise InputError for a training without data. ``feedback``: whether it has user
        feedback.
        """
        expect(self.data or feedback, "data", f"at least one source of {self.row_name}", "none")

    def feedback_file(self) -> str:
        """Return the file of the feedback that the stage trains on
        (`fastlm.feedback.build.PARTS`).
        """
        return f"train/{self.feedback_format}.jsonl"

    def with_feedback(self, ctx: StageContext) -> Self:
        """Return the stage with the rows of the feedback added to its data."""
        folder = ctx.optional("feedback")
        self.check_data(folder is not None)
        if folder is None:
            return self
        file = folder / self.feedback_file()
        has_rows = file.is_file() and file.stat().st_size
        expect(has_rows, "feedback", f"{self.row_name} in {file.parent}", "none")
        return self.with_source(str(file))

    def with_source(self, source: str) -> Self:
        """Return the stage with one more source of data."""
        return replace(self, data=(*self.data, source))

    def unit(self) -> str:
        """Return the unit in which the data is counted. At least one must be left to train on."""
        return self.row_name

    def load_trained(self, source: str | Path, **options: Any) -> "CausalLM":
        """Load the model at ``source`` to train it, in float32. ``options`` are the arguments of
        `LoraOptions.load_trained`, which overrides this.
        """
        import torch

        from fastlm.model.causal_lm import CausalLM

        return CausalLM.from_pretrained(source, dtype=torch.float32, keep_quantized=False)

    def read_data(self, tokenizer: "Tokenizer", context: int, ctx: StageContext) -> EncodedDataset:
        """Read the rows and encode them. ``context`` is the model's."""
        raise NotImplementedError

    def data_facts(self, data: Any) -> dict[str, Any]:
        """Return entries of the result about the data."""
        raise NotImplementedError

    def trained_module(self, model: "CausalLM") -> Any:
        """Return the module to train and save: the model, or one with its layers."""
        return model

    def objective(
        self, ctx: StageContext, model: Any, data: Any, options: TrainOptions, **common: Any
    ) -> "Objective":
        """Return the objective. ``common``: arguments of
        `fastlm.train.objective.EpochObjective`.
        """
        raise NotImplementedError

    def prepare(self, ctx: StageContext) -> TrainingSetup:
        from fastlm.checkpoint.architectures import expected_shapes
        from fastlm.tokenizer.load import load_tokenizer

        self = self.with_feedback(ctx)
        source = ctx.path("model")
        model = self.load_trained(source, dtype=self.dtype, seed=self.seed, warn=ctx.warning)
        config = model.config
        tokenizer = chat_tokenizer(load_tokenizer(source, config.to_dict()), self.chat_template)
        data = self.read_data(tokenizer, config.max_position_embeddings, ctx)
        if not data.training:
            raise InputError(
                f"data: expected {self.unit()} to {self.row_use}, got none in {data.summary()}"
            )
        prompt, text = data.sample_prompt() if "sample_tokens" not in self.unused else ([], "")
        mixture = data.mixture()
        options = self.train_options(sum(mixture.epoch_counts()))
        config.eos_token_id = sorted(config.stop_ids | tokenizer.stop_ids)
        module = self.trained_module(model)
        objective = self.objective(
            ctx, module, data, options, batch_size=self.batch_size, seed=self.seed,
            base=weights_digest(module), tokenizer=tokenizer, prompt=prompt, mixture=mixture,
        )  # fmt: skip
        facts = {
            "parameters": sum(map(math.prod, expected_shapes(config).values())),
            "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "rows_read": data.rows.total,
            "counts": dict(data.rows.by_reason),
            "prompt": text,
            **self.data_facts(data),
        }
        return TrainingSetup(module, tokenizer, objective, options, facts, source)

    def identity(self) -> dict[str, Any]:
        return {k: v for k, v in super().identity().items() if k != "chat_template"}

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        template = input_digest.hash_tree(self.chat_template) if self.chat_template else None
        return [input_digest.hash_sources(self.data, FORMATS), template]
