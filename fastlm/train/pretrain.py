"""Pretrain a base model by next-token prediction on packed shards."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastlm.errors import InputError, unknown_key
from fastlm.pipeline.stage import Facts, InputSpec, ReportSection, StageContext, at_least_one
from fastlm.sources.input_digest import InputDigest
from fastlm.train.objective import Objective
from fastlm.train.options import TrainOptions, expect
from fastlm.train.training_stage import TrainingSetup, TrainingStage

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from fastlm.checkpoint.config import ModelConfig
    from fastlm.data.shards import BatchSampler, TokenDataset
    from fastlm.tokenizer.tokenizer import Tokenizer

    WindowBatch = tuple[Tensor, Tensor, Tensor | None]  # input_ids, labels, cu_seqlens


class PretrainObjective(Objective):
    """The objective of `Pretrain`: cross-entropy of the next token in packed windows. Validation is
    in bits per byte.

    With ``document_mask``, attention stays inside documents and positions restart with each
    (`fastlm.data.shards.document_offsets`), in training and in validation. InputError: the data or
    the tokenizer has more tokens than the model.
    """

    def __init__(
        self,
        model: "nn.Module",
        sampler: "BatchSampler",
        val: "TokenDataset | None",
        options: TrainOptions,
        tokenizer: "Tokenizer | None" = None,
        *,
        document_mask: bool = False,
    ):
        vocab_size = model.get_parameter("model.embed_tokens.weight").shape[0]
        for name, part in (("train", sampler.dataset), ("val", val), ("tokenizer", tokenizer)):
            size = vocab_size if part is None else part.vocab_size
            expected = f"a vocabulary of at most the model's {vocab_size}"
            expect(size <= vocab_size, name, expected, size)
        self.trained = model
        self.sampler, self.val, self.options = sampler, val, options
        self.tokenizer, self.document_mask = tokenizer, document_mask
        self.device = next(model.parameters()).device

    def identity(self) -> dict[str, Any]:
        state = self.sampler.state_dict()
        fixed = {f"data.{k}": v for k, v in state.items() if k not in ("epoch", "position")}
        fixed["document_mask"] = self.document_mask
        return {**fixed, "batch_size": self.sampler.batch_size}

    def next_batches(self, count: int) -> "list[np.ndarray]":
        """Return the windows of ``count`` micro-batches. `loss` reads their tokens, so each process
        reads only its own.
        """
        return [self.sampler.next_windows() for _ in range(count)]

    def read(self, windows: "np.ndarray") -> "WindowBatch":
        """Read the tokens of a micro-batch of `next_batches`."""
        from fastlm.data.shards import document_offsets

        input_ids, labels = self.sampler.read(windows)
        offsets = None  # also if no document ends inside a window
        if self.document_mask:
            offsets = document_offsets(input_ids, self.sampler.dataset.eos_id)
        if offsets is not None:
            offsets = offsets.to(self.device)
        return input_ids.to(self.device), labels.to(self.device), offsets

    def num_items(self, batch: "np.ndarray") -> int:
        return len(batch) * self.sampler.seq_len  # packed windows have no ignored labels

    def loss(self, batch: "np.ndarray", num_items: int) -> "Tensor":
        input_ids, labels, offsets = self.read(batch)
        kwargs = {} if offsets is None else {"cu_seqlens": offsets}
        return self.trained(input_ids, shift_labels=labels, num_items=num_items, **kwargs).loss

    def position(self) -> str:
        state = self.sampler.state_dict()
        return (
            f"epoch {state['epoch']}, windows from {state['position']} of"
            f" {self.sampler.dataset.path}"
        )

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)

    def validate(self) -> dict[str, float]:
        from fastlm.model.bits_per_byte import evaluate

        if self.val is None:
            return {}
        result = evaluate(
            self.trained, self.val, self.sampler.seq_len, self.sampler.batch_size,
            max_tokens=self.options.val_tokens,
            document_mask=self.document_mask,
        )  # fmt: skip
        return {"val_loss": result.loss, "bits_per_byte": result.bits_per_byte}

    def sample(self) -> str | None:
        import torch

        o = self.options
        if self.tokenizer is None or o.sample_tokens == 0:
            return None
        ids = self.tokenizer.encode(o.sample_prompt)
        if not ids:
            ids = [self.sampler.dataset.eos_id]
        tokens = self.trained.generate(  # type: ignore[operator]
            torch.tensor([ids], device=self.device),
            max_new_tokens=o.sample_tokens, temperature=0.8, top_k=50, seed=self.sampler.seed,
            stop_ids=(self.sampler.dataset.eos_id,),
        )  # fmt: skip
        return o.sample_prompt + self.tokenizer.decode(tokens[0, len(ids) :].tolist())


@dataclass(frozen=True)
class Pretrain(TrainingStage):
    """Train a model on token shards. The same command run again resumes from the last checkpoint.

    With a larger budget the training continues, at the learning rate that the new schedule has at
    that point.
    """

    kind = "pretrain"
    command = ("pretrain",)
    version = 2
    inputs = {
        "shards": InputSpec(("shards",), "Folder with token shards in train/ and heldout/"),
        "tokenizer": InputSpec(
            ("tokenizer",), "Tokenizer, for samples and the model folder", optional=True
        ),
    }
    settings_in = ("config",)
    validation_metrics = {"val_loss": False, "bits_per_byte": False}
    result = {**TrainingStage.result, "epochs": int, "train_tokens": int, "prompt": str}

    batch_size: Annotated[int, "Put this many sequences into a micro-batch"] = 16
    seq_len: Annotated[int, "Train on sequences of this many tokens"] = 256
    document_mask: Annotated[
        bool, "Keep attention inside documents, and restart positions with each"
    ] = False
    seed: Annotated[
        int, "Draw the initial weights, the data order and the samples with this seed"
    ] = 0
    config: Annotated[str, "Build the model of this config.json, in Hugging Face's format"] = ""
    # the same as a table of a recipe, where the vocabulary is the tokenizer's
    model: dict[str, Any] | None = None

    def check(self) -> None:
        from fastlm.checkpoint.config import ModelConfig

        super().check()
        at_least_one(self, "batch_size", "seq_len")
        expect(
            bool(self.config) != (self.model is not None), "config",
            "the model as a config.json, or in a recipe as the table model",
            "both" if self.config else "neither",
        )  # fmt: skip
        names = {f.name for f in fields(ModelConfig)} - {"extra"} | {"rope_theta", "rope_scaling"}
        for key in self.model or ():
            if key not in names:
                raise InputError(unknown_key(f"model.{key}", key, names))

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        (shards,) = inputs["shards"]
        tokenizer = inputs["tokenizer"][0] if inputs["tokenizer"] else shards
        name = tokenizer["name"]
        shards_tokenizer = shards.get("tokenizer", name) if inputs["tokenizer"] else name
        expected = f"the one that made the shards, {shards_tokenizer!r}"
        expect(shards_tokenizer == name, "tokenizer", expected, repr(name))
        vocab_size = tokenizer.get("vocab_size")
        if self.model is not None and vocab_size is None and "vocab_size" not in self.model:
            return {}  # an input from outside the run is not read yet
        return {"config": self.model_config(vocab_size, 0)}

    def model_config(self, vocab_size: int | None, eos_id: int | None) -> "ModelConfig":
        """Return the model's configuration. For a table of a recipe, the default context is
        `seq_len`.
        """
        from fastlm.checkpoint.architectures import parse_config
        from fastlm.checkpoint.config import ModelConfig
        from fastlm.files import read_json

        if self.model is None:
            return parse_config(read_json(self.config), Path(self.config))
        values = {
            "max_position_embeddings": self.seq_len,
            "tie_word_embeddings": True,
            "bos_token_id": eos_id,
            "eos_token_id": eos_id,
            **self.model,
            **({"vocab_size": vocab_size} if vocab_size is not None else {}),
        }
        try:
            return ModelConfig.from_dict(values)
        except InputError as error:
            raise InputError(f"model.{error}") from None

    def identity(self) -> dict[str, Any]:
        return {k: v for k, v in super().identity().items() if k != "config"}

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        return input_digest.hash_tree(self.config) if self.config else None

    def prepare(self, ctx: StageContext) -> TrainingSetup:
        from fastlm.data.shards import INDEX, BatchSampler, TokenDataset
        from fastlm.model.causal_lm import CausalLM
        from fastlm.tokenizer.tokenizer import Tokenizer

        path = ctx.optional("tokenizer")
        tokenizer = Tokenizer.load(path) if path else None
        config = self.model_config(
            tokenizer.vocab_size if tokenizer else None, tokenizer.eos_id if tokenizer else None
        )
        shards = ctx.path("shards")
        heldout = shards / "heldout"
        train_data = TokenDataset(shards if (shards / INDEX).is_file() else shards / "train")
        val_data = TokenDataset(heldout) if (heldout / INDEX).is_file() else None
        for dataset in (train_data, val_data):
            if tokenizer and dataset:
                dataset.check_tokenizer(tokenizer, "shards")
        sampler = BatchSampler(train_data, self.batch_size, self.seq_len, seed=self.seed)
        model = CausalLM(config, seed=self.seed)
        options = self.loop_options()
        objective = PretrainObjective(
            model, sampler, val_data, options, tokenizer, document_mask=self.document_mask
        )
        facts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_tokens": train_data.tokens,
            "prompt": self.sample_prompt,
        }
        return TrainingSetup(model, tokenizer, objective, options, facts)

    def finish(self, training: TrainingSetup) -> dict[str, Any]:
        return {"epochs": cast(PretrainObjective, training.objective).sampler.epoch + 1}

    def section(
        self, ctx: StageContext, result: Mapping[str, Any], metrics: list[dict[str, Any]]
    ) -> ReportSection:
        from fastlm.pipeline.charts import loss_chart
        from fastlm.pipeline.text import count_text, seconds_text

        step = self.batch_size * self.seq_len * self.gradient_accumulation_steps
        tokens, train_tokens = result["tokens"], result["train_tokens"]
        if tokens < train_tokens:
            usage = f"of which {100 * tokens / train_tokens:.0f} % were used"
        else:
            usage = f"used {tokens / train_tokens:.1f} times"
        batch = f"{self.batch_size} × {self.seq_len} tokens"  # noqa: RUF001 - for people
        if self.gradient_accumulation_steps > 1:
            batch += f", {self.gradient_accumulation_steps} accumulated"
        shape = self.config or ", ".join(f"{k} {v}" for k, v in (self.model or {}).items())
        duration = seconds_text(result["used_seconds"])
        return ReportSection(
            "Training",
            f"The training used {count_text(tokens)} tokens: {result['steps']:,} steps of"
            f" {'up to ' if self.batch_warmup else ''}{step:,}.",
            facts={
                "model": shape,
                "batch": batch,
                "training text": f"{count_text(train_tokens)} tokens, {usage}",
                "speed": f"{result['tokens_per_second']:,.0f} tokens per second in steps",
            },
            charts=[loss_chart(metrics)],
            cards=[
                (count_text(result["parameters"]), "parameters"),
                (count_text(tokens), f"tokens of training in {duration}"),
            ],
        )

    def samples_caption(self, result: Mapping[str, Any]) -> str:
        prompt = result["prompt"]
        start = f"the prompt “{prompt}”" if prompt else "the start of a document"
        return f"Sampled with the same seed each time, from {start}."
