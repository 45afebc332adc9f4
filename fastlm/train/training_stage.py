"""What all stages that train share: the loop, what they leave, the result and the report; and what
those on rows of text share (conversations, preferences, prompts): options, and the way from a model
and rows to a training.
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
    ("feedback",), "What `fastlm feedback build` made, beside the data", optional=True
)
MAX_LENGTH = 2048  # tokens of a conversation by default, where the context is longer: bounds memory


@dataclass
class TrainingSetup:
    """A training that can begin.

    ``model``: what is saved. ``source``: the folder of the model it began as. ``facts``: what the
    result says of the data and the model. ``on_diverged``: see `fastlm.train.loop.train`.
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
    """A stage that trains a model. A subclass defines `prepare`, and for the user `outcome` and
    `section`.
    """

    outputs = {"model": MODEL}
    checkpoints = ("checkpoints",)
    result = {
        "steps": int, "tokens": int, "tokens_per_second": float, "loss": float | None,
        "metrics": dict, "parameters": int, "used_seconds": float, "load": str,
    }  # fmt: skip

    seed: Annotated[int, "Seed of the order of the data"] = 0

    def check(self) -> None:
        super().check()
        not_negative(self, "seed")

    def prepare(self, ctx: StageContext) -> TrainingSetup:
        """Load the model and read the data."""
        raise NotImplementedError

    def finish(self, training: TrainingSetup) -> dict[str, Any]:
        """Return what the result says of the trained model, which is saved afterwards."""
        return {}

    def save_trained(self, model: Any, folder: Path, source: Path | None) -> None:
        """Write the model to ``folder``; it began as the one in ``source``."""
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
        trained["load"] = f"{load:.1f} when the training began, {now:.1f} when it ended"
        measured = self.finish(training)
        self.save(training, ctx.out / MODEL)
        return {**trained, **training.facts, **measured}

    def outcome(self, result: Mapping[str, Any], ctx: StageContext) -> tuple[str, list[str]]:
        """Return what was learnt from, and figures of the end, for the user."""
        return "", [loss_text(result), f"{result['tokens_per_second']:,.0f} tokens/s"]

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        data, figures = self.outcome(result, ctx)
        parts = [*([data] if data else []), f"{result['steps']} steps", *figures]
        if self.keep == "best":
            name = "val_loss" if "val_loss" in result["metrics"] else "val_score"
            value = result["metrics"][name]
            parts.append(f"weights of step {result['best_step']} with {name} {value:.4f}")
        return f"{', '.join(parts)}: {ctx.out / MODEL}"

    def section(
        self, ctx: StageContext, result: Mapping[str, Any], metrics: list[dict[str, Any]]
    ) -> ReportSection:
        """Return the stage's part of report.html, without what `report` adds for all of them."""
        raise NotImplementedError

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        from fastlm.pipeline.text import seconds_text
        from fastlm.train.charts import training_charts

        metrics = read_metrics(ctx.out / METRICS)
        part = self.section(ctx, result, metrics)
        part.charts = [*part.charts, *training_charts(metrics)]
        part.facts = {
            **part.facts,
            "schedule": f"{OPTIMIZERS[self.optimizer]}, {self.schedule}, peak {self.lr},"
            f" weight decay {self.weight_decay}, {self.dtype}",
            "time": f"{seconds_text(result['used_seconds'])}, steps and checkpoints",
            "machine load": result["load"],
        }
        if part.template == ReportSection.template:
            part.template = "training.html.jinja"
            samples = [m for m in metrics if "sample" in m]
            part.values = {"samples": samples, "how": self.sampled(result)}
        return part

    def sampled(self, result: Mapping[str, Any]) -> str:
        """Return how the samples of the report were made."""
        return f"Answers to “{shorten(result['prompt'], 200)}”, at temperature 0."


def loss_text(result: Mapping[str, Any]) -> str:
    return "no loss" if result["loss"] is None else f"loss {result['loss']:.4f}"


@dataclass(frozen=True)
class ChatStage(TrainingStage):
    """A training on rows that the model's chat template writes. A subclass defines `read_data`,
    `data_facts` and `objective`.
    """

    truncations: ClassVar[tuple[str, ...]] = ("skip", "truncate")  # values of `truncation`
    result = {
        **TrainingStage.result, "trained_parameters": int, "heldout": int, "read": int,
        "counts": dict, "prompt": str,
    }  # fmt: skip
    rows: ClassVar[str] = "conversations"  # what `data` holds
    use: ClassVar[str] = "learn from"  # what they are for
    sources_in: ClassVar[tuple[str, ...]] = ("data",)
    settings_in: ClassVar[tuple[str, ...]] = ("chat_template",)
    instructs: ClassVar[bool] = True
    form: ClassVar[str] = "sft"  # of `fastlm.feedback.build.FORMS`

    data: Annotated[
        tuple[str, ...],
        MaybePositional("Rows: .jsonl or .json files, folders, pypi:, sdist: or deb:NAME#GLOB"),
    ] = ()
    epochs: Annotated[float | None, "Passes over the data; default: 1 if nothing else ends"] = None
    batch_size: Annotated[int, "Conversations per micro-batch, joined without padding"] = 8
    max_length: Annotated[
        int | None, "Most tokens of an example; default: the context, at most 2048"
    ] = None
    truncation: Annotated[str, "Longer examples: skip or truncate"] = "skip"
    skip_bad: Annotated[bool, "Count bad rows instead of stopping at the first one"] = False
    date: Annotated[str, "What chat templates take for today, YYYY-MM-DD"] = "2024-07-26"
    heldout: Annotated[float, "Share of the data that is held out"] = 0.05
    chat_template: Annotated[str, "Jinja file; default: the model's own, else ChatML"] = ""
    lr: Annotated[float, "Peak learning rate"] = 2e-5
    warmup_ratio: Annotated[float, "Share of the run in which the rate rises"] = 0.03
    weight_decay: Annotated[float, "Weight decay of matrices"] = 0.0
    validations: Annotated[int, "Number of validations, evenly spaced over the run"] = 4
    sample_at: Annotated[
        tuple[float, ...], "Moments of the run, 0 to 1, at which the model answers a prompt"
    ] = (0.0, 0.5, 1.0)
    sample_prompt: Annotated[str, "Message that a sample answers; default: a held-out prompt"] = ""

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
        """The options of the loop, with `epochs` as a number of steps."""
        options = self.loop_options()
        epochs = self.epochs
        if epochs is None and not (self.max_steps is self.max_seconds is self.max_tokens is None):
            return options
        steps = self.steps_of_epochs(epochs or 1.0, examples)
        most = steps if self.max_steps is None else self.max_steps
        return replace(options, max_steps=min(steps, most))

    def step_size(self) -> int:
        """Return the rows of a step, of all its micro-batches."""
        return self.batch_size * self.gradient_accumulation_steps

    def steps_of_epochs(self, epochs: float, examples: int) -> int:
        """Return the steps of so many passes over the examples. InputError: `batch_warmup`, which
        the number of steps would depend on.
        """
        expect(
            not self.batch_warmup, "batch_warmup",
            "0 where epochs end the training (max_tokens or max_steps do without)",
            self.batch_warmup,
        )  # fmt: skip
        batches = math.ceil(examples / self.batch_size)
        return math.ceil(epochs * math.ceil(batches / self.gradient_accumulation_steps))

    def longest(self, context: int) -> int:
        """The most tokens of an example of a model with this context."""
        longest = self.max_length or min(context, MAX_LENGTH)
        expect(longest <= context, "max_length", f"at most the model's context {context}", longest)
        return longest

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_data(bool(inputs.get("feedback")))
        return inputs["model"][0]

    def check_data(self, feedback: bool) -> None:
        """Refuse a training without data. ``feedback``: it has that of users."""
        expect(self.data or feedback, "data", f"at least one source of {self.rows}", "none")

    def feedback_file(self) -> str:
        """The file of the feedback that it learns from (`fastlm.feedback.build.PARTS`)."""
        return f"train/{self.form}.jsonl"

    def with_feedback(self, ctx: StageContext) -> Self:
        """The stage with the rows of the feedback among its data."""
        folder = ctx.optional("feedback")
        self.check_data(folder is not None)
        if folder is None:
            return self
        file = folder / self.feedback_file()
        some = file.is_file() and file.stat().st_size
        expect(some, "feedback", f"{self.rows} in {file.parent}", "none")
        return self.with_source(str(file))

    def with_source(self, source: str) -> Self:
        return replace(self, data=(*self.data, source))

    def unit(self) -> str:
        """Return what the data is counted in, of which there must be some."""
        return self.rows

    def load_trained(self, source: str | Path, **options: Any) -> "CausalLM":
        """Load the model at ``source`` to train it, in float32. ``options`` are those of
        `LoraOptions.load_trained`, which takes the place of this.
        """
        import torch

        from fastlm.model.causal_lm import CausalLM

        return CausalLM.from_pretrained(source, dtype=torch.float32, keep_quantized=False)

    def read_data(self, tokenizer: "Tokenizer", context: int, ctx: StageContext) -> EncodedDataset:
        """Return the rows as tokens. ``context``: of the model."""
        raise NotImplementedError

    def data_facts(self, data: Any) -> dict[str, Any]:
        """Return what the result says of the data."""
        raise NotImplementedError

    def module(self, model: "CausalLM") -> Any:
        """Return what is trained and saved: the model, or what has its layers."""
        return model

    def objective(
        self, ctx: StageContext, model: Any, data: Any, options: TrainOptions, **common: Any
    ) -> "Objective":
        """Return what is learnt; ``common`` is for `fastlm.train.objective.EpochObjective`."""
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
                f"data: expected {self.unit()} to {self.use}, got none in {data.told()}"
            )
        prompt, text = data.sample_prompt() if "sample_tokens" not in self.unused else ([], "")
        mixture = data.mixture()
        options = self.train_options(sum(mixture.taken()))
        config.eos_token_id = sorted(config.stop_ids | tokenizer.stop_ids)
        module = self.module(model)
        objective = self.objective(
            ctx, module, data, options, batch_size=self.batch_size, seed=self.seed,
            base=weights_digest(module), tokenizer=tokenizer, prompt=prompt, mixture=mixture,
        )  # fmt: skip
        facts = {
            "parameters": sum(map(math.prod, expected_shapes(config).values())),
            "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "read": data.rows.read,
            "counts": dict(data.rows.counts),
            "prompt": text,
            **self.data_facts(data),
        }
        return TrainingSetup(module, tokenizer, objective, options, facts, source)

    def identity(self) -> dict[str, Any]:
        return {k: v for k, v in super().identity().items() if k != "chat_template"}

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        template = input_digest.hash_tree(self.chat_template) if self.chat_template else None
        return [input_digest.hash_sources(self.data, FORMATS), template]
