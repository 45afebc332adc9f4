"""What the stages that train on rows of text share (conversations, preferences, prompts): options,
and the way from a model and rows to a training.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from fastlm.data.conversations import FORMATS
from fastlm.errors import InputError
from fastlm.pipeline.stage import Facts, Job, MaybePositional, Takes, at_least_one, one_of, positive
from fastlm.sources.input_digest import Contents
from fastlm.train.encoding import TrainingData, chat_tokenizer, weights_digest
from fastlm.train.options import TrainOptions
from fastlm.train.training_stage import Training, TrainingStage

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.objective import Objective

FEEDBACK = Takes(("feedback",), "What `fastlm feedback build` made, beside the data", optional=True)
LONGEST = 2048  # tokens of a conversation by default, where the context is longer: bounds memory


@dataclass(frozen=True)
class ChatStage(TrainingStage):
    """A training on rows that the model's chat template writes. A subclass defines `read_data`,
    `data_facts` and `objective`.
    """

    overlongs: ClassVar[tuple[str, ...]] = ("skip", "truncate")  # values of `overlong`
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
        MaybePositional(
            "Conversations: .jsonl or .json files, folders, pypi:, sdist: or deb:NAME#GLOB"
        ),
    ] = ()
    epochs: Annotated[float | None, "Passes over the data; default: 1 if nothing else ends"] = None
    batch_size: Annotated[int, "Conversations per micro-batch, joined without padding"] = 8
    seq_len: Annotated[
        int | None, "Most tokens per conversation; default: the context, at most 2048"
    ] = None
    overlong: Annotated[str, "Longer conversations: skip or truncate"] = "skip"
    skip_bad: Annotated[bool, "Count bad rows instead of stopping at the first one"] = False
    date: Annotated[str, "What chat templates take for today, YYYY-MM-DD"] = "2024-07-26"
    heldout: Annotated[float, "Share of the conversations that is held out"] = 0.05
    chat_template: Annotated[str, "Jinja file; default: the model's own, else ChatML"] = ""
    lr: Annotated[float, "Peak learning rate"] = 2e-5
    warmup: Annotated[float, "Share of the run in which the rate rises"] = 0.03
    weight_decay: Annotated[float, "Weight decay of matrices"] = 0.0
    validations: Annotated[int, "Number of validations, evenly spaced over the run"] = 4
    sample_at: Annotated[
        tuple[float, ...], "Moments of the run, 0 to 1, at which the model answers a prompt"
    ] = (0.0, 0.5, 1.0)
    sample_prompt: Annotated[str, "Message that a sample answers; default: a held-out prompt"] = ""

    def check(self) -> None:
        at_least_one(self, "batch_size", "accumulate")
        if self.seq_len is not None and self.seq_len < 2:
            raise InputError(f"seq_len: wanted 2 or more, got {self.seq_len}")
        positive(self, "epochs")
        self.train_options(1).check()
        if not 0 <= self.heldout < 1:
            raise InputError(f"heldout: wanted a share in [0, 1), got {self.heldout}")
        one_of(self, overlong=self.overlongs)
        try:
            day = date.fromisoformat(self.date).isoformat()
        except ValueError:
            day = ""
        if day != self.date:
            raise InputError(f"date: wanted YYYY-MM-DD, got {self.date!r}")
        self.check_seed()

    def train_options(self, examples: int) -> TrainOptions:
        """The options of the loop, with `epochs` as a number of steps."""
        options = self.loop_options()
        epochs = self.epochs
        if epochs is None and not (self.max_steps is self.max_seconds is self.max_tokens is None):
            return options
        steps = self.steps_of_epochs(epochs or 1.0, examples)
        most = steps if self.max_steps is None else self.max_steps
        return replace(options, max_steps=min(steps, most))

    def steps_of_epochs(self, epochs: float, examples: int) -> int:
        """Return the steps of so many passes over the examples. InputError: `batch_warmup`, which
        the number of steps would depend on.
        """
        if self.batch_warmup:
            raise InputError(
                "batch_warmup: wanted 0 where epochs end the training (max_tokens or max_steps do"
                f" without), got {self.batch_warmup}"
            )
        batches = math.ceil(examples / self.batch_size)
        return math.ceil(epochs * math.ceil(batches / self.accumulate))

    def longest(self, context: int) -> int:
        """The most tokens of an example of a model with this context."""
        if self.seq_len is not None and self.seq_len > context:
            raise InputError(
                f"seq_len: wanted at most the model's context {context}, got {self.seq_len}"
            )
        return self.seq_len or min(context, LONGEST)

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_data(bool(inputs.get("feedback")))
        return inputs["model"][0]

    def check_data(self, feedback: bool) -> None:
        """Refuse a training without data. ``feedback``: it has that of users."""
        if not self.data and not feedback:
            raise InputError(f"data: wanted at least one source of {self.rows}, got none")

    def part(self) -> str:
        """The part of the feedback that it learns from (`fastlm.feedback.build.PARTS`)."""
        return "train"

    def feedback_form(self) -> str:
        """The form of the rows that it reads of the feedback."""
        return self.form

    def with_feedback(self, job: Job) -> Self:
        """The stage with the rows of the feedback among its data."""
        folder = job.optional("feedback")
        self.check_data(folder is not None)
        if folder is None:
            return self
        file = folder / self.part() / f"{self.feedback_form()}.jsonl"
        if not file.is_file() or not file.stat().st_size:
            raise InputError(f"feedback: wanted {self.rows} in {file.parent}, got none")
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

        del options
        return CausalLM.from_pretrained(source, dtype=torch.float32, keep_quantized=False)

    def read_data(self, tokenizer: "Tokenizer", context: int, job: Job) -> TrainingData:
        """Return the rows as tokens. ``context``: of the model."""
        raise NotImplementedError

    def num_examples(self, data: TrainingData) -> int:
        """Return how many examples an epoch takes."""
        return len(data.training)

    def data_facts(self, data: TrainingData) -> dict[str, Any]:
        """Return what the result says of the data."""
        raise NotImplementedError

    def module(self, model: "CausalLM") -> Any:
        """Return what is trained and saved: the model, or what has its layers."""
        return model

    def objective(
        self, job: Job, model: Any, data: Any, options: TrainOptions, **common: Any
    ) -> "Objective":
        """Return what is learnt; ``common`` is for `fastlm.train.epochs.Epochs`."""
        raise NotImplementedError

    def prepare(self, job: Job) -> Training:
        from fastlm.checkpoint.architectures import expected_shapes
        from fastlm.tokenizer.load import load_tokenizer

        self = self.with_feedback(job)
        source = job.path("model")
        model = self.load_trained(source, dtype=self.dtype, seed=self.seed, warn=job.warn)
        config = model.config
        tokenizer = chat_tokenizer(load_tokenizer(source, config.to_dict()), self.chat_template)
        data = self.read_data(tokenizer, config.max_position_embeddings, job)
        if not data.training:
            raise InputError(f"data: wanted {self.unit()} to {self.use}, got none in {data.told()}")
        prompt, text = [], ""
        if "sample_tokens" not in self.unused:
            prompt, text = data.prompts.choose(self, tokenizer, data.context)
        options = self.train_options(self.num_examples(data))
        config.eos_token_id = sorted(config.stop_ids | tokenizer.stop_ids)
        module = self.module(model)
        objective = self.objective(
            job, module, data, options, batch_size=self.batch_size, seed=self.seed,
            base=weights_digest(module), tokenizer=tokenizer, prompt=prompt, device=module.device,
        )  # fmt: skip
        facts = {
            "parameters": sum(map(math.prod, expected_shapes(config).values())),
            "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "read": data.rows.read,
            "counts": dict(data.rows.counts),
            "prompt": text,
            **self.data_facts(data),
        }
        return Training(module, tokenizer, objective, options, facts, source)

    def identity(self) -> dict[str, Any]:
        return {k: v for k, v in super().identity().items() if k != "chat_template"}

    def contents(self, contents: Contents) -> Any:
        template = contents.tree(self.chat_template) if self.chat_template else None
        return [contents.sources(self.data, FORMATS), template]
