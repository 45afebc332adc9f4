"""Supervised fine-tuning: train a model on the assistant's messages of conversations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from fastlm.pipeline.stage import InputSpec, ReportSection, StageContext, not_negative
from fastlm.train.encoding import EncodedDataset, rows_summary
from fastlm.train.lora_options import LoraOptions
from fastlm.train.objective import IGNORE, EpochObjective, Example, Mixture, pack, truncate
from fastlm.train.options import expect
from fastlm.train.training_stage import FEEDBACK, ChatStage, loss_text

if TYPE_CHECKING:
    from torch import Tensor

    from fastlm.data.conversations import Conversation
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.objective import PackedBatch
    from fastlm.train.options import TrainOptions

# truncation -> the count of a longer conversation: with nothing left to learn, otherwise
TRUNCATION_COUNTS = {
    "skip": ("too long", "too long in part"),  # in part: with an example per answer
    "truncate": ("nothing left to learn", "truncated"),
    "split": ("nothing left to learn", "split"),
}


class SFTObjective(EpochObjective):
    """The objective of `SFT`: cross-entropy of the tokens with a loss.

    The loss is a mean over those tokens of the whole step, however they are spread over its
    micro-batches. ``neftune_noise_alpha``: see `fastlm.train.neftune`; 0: no noise. For the other
    arguments see `EpochObjective`.
    """

    def __init__(self, *args: Any, neftune_noise_alpha: float = 0.0, **common: Any):
        self.neftune_noise_alpha = neftune_noise_alpha
        super().__init__(*args, **common)

    def identity(self) -> dict[str, Any]:
        alpha = self.neftune_noise_alpha
        return {**super().identity(), **({"neftune_noise_alpha": alpha} if alpha else {})}

    def collate(self, examples: Sequence[Example]) -> Any:
        return pack(examples, self.device)

    def num_items(self, batch: "PackedBatch") -> int:
        return int((batch[1] != IGNORE).sum())

    def loss(self, batch: "PackedBatch", num_items: int) -> "Tensor":
        ids, labels, cu_seqlens = batch
        model: Any = self.trained
        noise = nullcontext()
        if self.neftune_noise_alpha and model.training:
            from fastlm.train.neftune import noisy_embeddings

            noise = noisy_embeddings(model, self.neftune_noise_alpha, cu_seqlens)
        with noise:
            return model(ids, shift_labels=labels, cu_seqlens=cu_seqlens, num_items=num_items).loss

    def validate(self) -> dict[str, float]:
        """Return the mean loss of at most `val_tokens` held-out tokens."""
        total, items = 0.0, 0
        for _, batch in self.heldout_batches():
            total += float(self.loss(batch, 1))
            items += self.num_items(batch)
        return {"val_loss": total / items} if items else {}


@dataclass(frozen=True)
class SFT(LoraOptions, ChatStage):
    """Fine-tune a model on the assistant's messages of conversations, with their end tokens.

    The model's own chat template renders the conversations; a model without one that has ChatML's
    tokens gets ChatML. The same command run again resumes from the last checkpoint.
    """

    kind = "sft"
    command = ("sft",)
    inputs = {
        "model": InputSpec(("model",), "Model to fine-tune: a run or a Hugging Face folder"),
        "feedback": FEEDBACK,
    }
    result = {
        **ChatStage.result, "conversations": int, "loss_tokens": int, "all_tokens": int,
        "sources": list,
    }  # fmt: skip
    notes = """Data are .jsonl and .json files of rows in the shapes of OpenAI (messages), ShareGPT
(conversations), Alpaca (instruction, input, output) and pairs (prompt, completion)."""

    truncations = tuple(TRUNCATION_COUNTS)

    truncation: Annotated[str, "Handle longer examples this way: skip, truncate or split"] = "skip"
    data_weights: Annotated[
        tuple[float, ...],
        "Give each data source this weight: how often an epoch takes it; default: once",
    ] = ()
    neftune_noise_alpha: Annotated[
        float, "Add noise of this size to the embeddings in training (NEFTune), such as 5"
    ] = 0.0

    def check(self) -> None:
        super().check()
        self.check_lora()
        weights, count = self.data_weights, len(self.data)
        valid = len(weights) in (0, count)
        expect(valid, "data_weights", f"one for each of {count} sources", len(weights))
        not_negative(self, "neftune_noise_alpha")
        for weight in weights:
            expect(0 < weight < math.inf, "data_weights", "positive numbers", weight)

    def with_source(self, source: str) -> Self:
        weights = (*self.data_weights, 1.0) if self.data_weights else ()
        return replace(self, data=(*self.data, source), data_weights=weights)

    def read_data(
        self, tokenizer: "Tokenizer", context: int, ctx: StageContext
    ) -> "ConversationDataset":
        return ConversationDataset(self, tokenizer, self.example_length(context), context, ctx)

    def data_facts(self, data: Any) -> dict[str, Any]:
        return {
            "conversations": data.conversations,
            "heldout": data.heldout_rows,
            "sources": data.sources(),
            "loss_tokens": sum(example.num_loss_tokens for example in data.training),
            "all_tokens": sum(len(example.ids) for example in data.training),
        }

    def objective(
        self, ctx: StageContext, model: Any, data: Any, options: "TrainOptions", **common: Any
    ) -> SFTObjective:
        return SFTObjective(
            model, data.training, data.heldout, options,
            neftune_noise_alpha=self.neftune_noise_alpha, **common,
        )  # fmt: skip

    def summary_parts(self, result: Mapping[str, Any], ctx: StageContext) -> tuple[str, list[str]]:
        speed = f"{result['tokens_per_second']:,.0f} loss tokens/s"
        return f"{result['conversations']:,} conversations", [loss_text(result), speed]

    def headline(self) -> tuple[str, str]:
        """Return title and note of the report section."""
        return "Fine-tuning", "Only the assistant's tokens have a loss."

    def section(
        self, ctx: StageContext, result: Mapping[str, Any], metrics: list[dict[str, Any]]
    ) -> ReportSection:
        from fastlm.pipeline.charts import loss_chart
        from fastlm.pipeline.text import count_text

        loss_tokens, all_tokens = result["loss_tokens"], result["all_tokens"]
        facts = {"conversations": rows_summary(result), **self.lora_facts(result)}
        if self.data_weights:
            facts["mixture"] = ", ".join(
                f"{s['weight']:g} x {s['source']} ({s['conversations']:,})"
                for s in result["sources"]
            )
        if self.neftune_noise_alpha:
            facts["noise"] = f"NEFTune, alpha {self.neftune_noise_alpha:g}"
        title, note = self.headline()
        return ReportSection(
            title,
            note,
            facts={
                **facts,
                "loss": f"{count_text(loss_tokens)} of {count_text(all_tokens)} tokens"
                f" ({100 * loss_tokens / all_tokens:.0f} %)",
                "batch": f"{self.step_size()} conversations without padding",
                "speed": f"{result['tokens_per_second']:,.0f} loss tokens per second",
            },
            charts=[loss_chart(metrics)],
            cards=[(f"{result['conversations']:,}", "training conversations")],
        )


class ConversationDataset(EncodedDataset):
    """The conversations of a stage as tokens. ``conversations``: the number of training ones."""

    def __init__(self, stage: SFT, *args: Any):
        self.source = 0  # index of the current row's source
        self.source_conversations = [0] * len(stage.data)
        self.source_examples = [0] * len(stage.data)
        super().__init__(stage, *args)

    @property
    def conversations(self) -> int:
        """The number of training conversations."""
        return sum(self.source_conversations)

    def read(self) -> Iterator["Conversation"]:
        from fastlm.data.conversations import read_conversations

        for index, spec in enumerate(self.stage.data):
            self.source = index
            yield from read_conversations((spec,), **self.reader_options())

    def prompt_of(self, row: "Conversation") -> Any:
        return row, row.prompt(), row.tools

    def encode(self, row: "Conversation") -> list[Example]:
        truncation = self.stage.truncation
        encoded = self.encode_messages(row)
        examples = [piece for e in encoded for piece in truncate(e, self.max_length, truncation)]
        if any(len(e.ids) > self.max_length for e in encoded):
            self.rows.by_reason[TRUNCATION_COUNTS[truncation][bool(examples)]] += 1
        return examples

    def add_training(self, examples: Sequence[Example]) -> None:
        super().add_training(examples)
        self.source_conversations[self.source] += 1
        self.source_examples[self.source] += len(examples)

    def mixture(self) -> Mixture:
        weights = self.stage.data_weights or (1.0,) * len(self.source_examples)  # type: ignore[attr-defined]
        return Mixture(tuple(self.source_examples), weights)

    def sources(self) -> list[dict[str, Any]]:
        """Return an entry of the result for each source."""
        mixture = self.mixture()
        columns = (
            self.stage.data,
            mixture.weights,
            self.source_conversations,
            mixture.epoch_counts(),
        )
        keys = ("source", "weight", "conversations", "examples_per_epoch")
        return [dict(zip(keys, row)) for row in zip(*columns)]
