"""Supervised fine-tuning: a model learns the assistant's messages of conversations."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, Self

from fastlm.errors import InputError
from fastlm.pipeline.stage import Job, Part, Stage, Takes
from fastlm.torchrun import leads
from fastlm.train.best import taken
from fastlm.train.chat_options import FEEDBACK, ChatOptions
from fastlm.train.encoding import (
    IGNORE,
    Encoder,
    Example,
    Prompts,
    chat_tokenizer,
    digest,
    fit,
    pack,
    place_in_order,
    reasons,
    told_rows,
    weights_digest,
)
from fastlm.train.epochs import Epochs
from fastlm.train.lora_options import LoraOptions
from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.mixture import Mixture
from fastlm.train.options import OPTIMIZERS

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from fastlm.data.conversations import Conversation
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.encoding import Batch
    from fastlm.train.options import TrainOptions

MODEL = "model"
# What happens to a longer conversation -> how it is counted: with nothing left to learn, else
OVERLONG = {
    "skip": ("too long", "too long in part"),  # in part: it gave an example per answer
    "truncate": ("nothing left to learn", "truncated"),
    "split": ("nothing left to learn", "split"),
}


class AnswerTokens(Epochs):
    """The objective of `Sft`: cross-entropy of learnt tokens.

    The loss is a mean over the learnt tokens of the whole step, however they are spread over its
    micro-batches. ``mixture``: the sources of ``examples``, one after another; by default one of
    weight 1. For the other arguments see `Epochs`.
    """

    def __init__(
        self,
        model: "nn.Module",
        examples: Sequence[Example],
        heldout: Sequence[Example],
        options: "TrainOptions",
        *,
        batch_size: int,
        seed: int,
        base: str,
        tokenizer: "Tokenizer | None",
        prompt: Sequence[int],
        device: "torch.device",
        mixture: Mixture | None = None,
    ):
        self.mixture = mixture or Mixture((len(examples),), (1.0,))
        super().__init__(
            model, [e.place for e in examples], options, batch_size=batch_size, seed=seed,
            base=base, data=digest(examples), tokenizer=tokenizer, prompt=prompt, device=device,
        )  # fmt: skip
        self.examples, self.heldout = examples, heldout

    def order_of(self, rng: "np.random.Generator") -> "np.ndarray":
        return self.mixture.order(rng)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **self.mixture.identity()}

    def next_batches(self, count: int) -> "list[Batch]":
        """Return ``count`` micro-batches, or what the epoch has left."""
        return [self._packed([self.examples[i] for i in batch]) for batch in self.take(count)]

    def _packed(self, examples: Sequence[Example]) -> "Batch":
        ids, labels, cu_seqlens = pack(examples)
        return ids.to(self.device), labels.to(self.device), cu_seqlens.to(self.device)

    def num_items(self, batch: "Batch") -> int:
        return int((batch[1] != IGNORE).sum())

    def tokens(self, batch: "Batch") -> int:
        return self.num_items(batch)

    def loss(self, batch: "Batch", num_items: int) -> "Tensor":
        ids, labels, cu_seqlens = batch
        return self.trained(
            ids, shift_labels=labels, cu_seqlens=cu_seqlens, num_items=num_items
        ).loss

    def validate(self) -> dict[str, float]:
        """Return the mean loss of the held-out tokens, of at most `val_tokens` of them."""
        total, items = 0.0, 0
        for start in range(0, len(self.heldout), self.batch_size):
            batch = self._packed(self.heldout[start : start + self.batch_size])
            total += float(self.loss(batch, 1))
            items += self.num_items(batch)
            if items >= self.options.val_tokens:
                break
        return {"val_loss": total / items} if items else {}


@dataclass(frozen=True)
class Sft(LoraOptions, ChatOptions, Stage):
    """Fine-tune a model on conversations. It learns the assistant's messages, and to end them.

    The model's own chat template writes the conversations; a model without one that has ChatML's
    tokens gets ChatML. The same command run again resumes from the last checkpoint.
    """

    kind = "sft"
    command = ("sft",)
    reads = {
        "model": Takes(("model",), "Model to fine-tune: a run, a Hugging Face folder"),
        "feedback": FEEDBACK,
    }
    leaves = {"model": MODEL}
    scratch = ("checkpoints",)
    result = {
        "steps": int, "tokens": int, "tokens_per_second": float, "loss": float | None,
        "parameters": int, "conversations": int, "heldout": int, "read": int, "counts": dict,
        "learnt_tokens": int, "all_tokens": int, "used_seconds": float, "load": str, "prompt": str,
        "trained_parameters": int, "sources": list,
    }  # fmt: skip
    notes = """Read are .jsonl and .json files of rows in the shapes of OpenAI (messages), ShareGPT
(conversations), Alpaca (instruction, input, output) and pairs (prompt, completion)."""

    overlongs = tuple(OVERLONG)

    overlong: Annotated[str, "Longer conversations: skip, truncate or split"] = "skip"
    data_weights: Annotated[
        tuple[float, ...], "How often an epoch takes each source of the data; default: once"
    ] = ()

    def check(self) -> None:
        super().check()
        self.check_lora()
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise InputError(
                f"data_weights: wanted one for each of {len(self.data)} sources,"
                f" got {len(self.data_weights)}"
            )
        for weight in self.data_weights:
            if not 0 < weight < math.inf:
                raise InputError(f"data_weights: wanted positive numbers, got {weight}")

    def with_source(self, source: str) -> Self:
        weights = (*self.data_weights, 1.0) if self.data_weights else ()
        return replace(self, data=(*self.data, source), data_weights=weights)

    def objective(self, job: Job, *args: Any, **options: Any) -> AnswerTokens:
        """The objective; all but ``job`` is for `AnswerTokens`."""
        del job
        return AnswerTokens(*args, **options)

    def encoded(self, tokenizer: "Tokenizer", seq_len: int, job: Job) -> "Encoded":
        """The conversations to learn, as tokens."""
        return Encoded(self, tokenizer, seq_len, job)

    def run(self, job: Job) -> dict[str, Any]:
        import torch

        from fastlm.checkpoint.architectures import expected_shapes
        from fastlm.train.loop import train

        self = self.with_feedback(job)
        source = job.path("model")
        model = self.load_trained(source, dtype=self.dtype, seed=self.seed, warn=job.warn)
        tokenizer = chat_tokenizer(source, model.config.to_dict(), self.chat_template)
        context = model.config.max_position_embeddings
        texts = self.encoded(tokenizer, self.longest(context), job)
        prompt, asked = texts.prompts.choose(self, tokenizer, context)
        if not texts.training:
            raise InputError(
                f"data: wanted conversations to learn from, got none in {texts.told()}"
            )
        mixture = texts.mixture()
        options = self.train_options(sum(mixture.taken()))
        base = weights_digest(model)
        model.config.eos_token_id = sorted(model.config.stop_ids | tokenizer.stop_ids)
        objective = self.objective(
            job, model, texts.training, texts.heldout, options, batch_size=self.batch_size,
            seed=self.seed, base=base, tokenizer=tokenizer, prompt=prompt, device=model.device,
            mixture=mixture,
        )  # fmt: skip
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        torch.manual_seed(self.seed)
        load = os.getloadavg()[0]
        done = train(objective, options, job.out, track=job.track, on_event=job.on_event)
        if not leads():
            return {}
        self.save_trained(model, job.out / MODEL, source)
        tokenizer.save(job.out / MODEL)
        return {
            **done.facts(load),
            "parameters": sum(map(math.prod, expected_shapes(model.config).values())),
            "trained_parameters": trained,
            "conversations": texts.conversations,
            "sources": texts.sources(mixture),
            "heldout": texts.held_out,
            "read": texts.rows.read,
            "counts": dict(texts.rows.counts),
            "learnt_tokens": sum(example.learnt for example in texts.training),
            "all_tokens": sum(len(example.ids) for example in texts.training),
            "prompt": asked,
        }

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        loss = "no loss" if result["loss"] is None else f"loss {result['loss']:.4f}"
        return (
            f"{result['conversations']:,} conversations, {result['steps']} steps, {loss},"
            f" {result['tokens_per_second']:,.0f} learnt tokens/s{taken(result, self.take)}:"
            f" {job.out / MODEL}"
        )

    def headline(self) -> tuple[str, str]:
        """Title and note of the part of the report."""
        return "Fine-tuning", "The loss is of the assistant's tokens alone."

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        from fastlm.pipeline.charts import loss_chart
        from fastlm.pipeline.text import count_text, seconds_text

        metrics = read_metrics(job.out / METRICS)
        learnt, whole = result["learnt_tokens"], result["all_tokens"]
        rows = f"{result['read']:,} rows, {result['heldout']:,} held out"
        more = {}
        if self.lora_rank:
            more["adapters"] = self.lora_told(result)
        if self.data_weights:
            more["mixture"] = ", ".join(
                f"{s['weight']:g} x {s['source']} ({s['conversations']:,})"
                for s in result["sources"]
            )
        if result["counts"]:
            rows += f"; {reasons(result['counts'])}"
        title, note = self.headline()
        return Part(
            title,
            note,
            facts={
                "conversations": rows,
                **more,
                "learnt": f"{count_text(learnt)} of {count_text(whole)} tokens"
                f" ({100 * learnt / whole:.0f} %)",
                "batch": f"{self.batch_size * self.accumulate} conversations without padding",
                "schedule": f"{OPTIMIZERS[self.optimizer]}, {self.schedule}, peak {self.lr},"
                f" weight decay {self.weight_decay}, {self.dtype}",
                "time": f"{seconds_text(result['used_seconds'])}, steps and checkpoints",
                "speed": f"{result['tokens_per_second']:,.0f} learnt tokens per second",
                "machine load": result["load"],
            },
            charts=[loss_chart(metrics)],
            cards=[(f"{result['conversations']:,}", "conversations learnt from")],
            template="training.html.jinja",
            values={
                "samples": [m for m in metrics if "sample" in m],
                "how": f"Answers to “{shorten(result['prompt'], 200)}”, at temperature 0.",
            },
        )


class Encoded:
    """The conversations of a stage as tokens: ``training`` and ``heldout`` examples (in the order
    of `place_in_order`), from so many ``conversations`` and ``held_out`` ones.
    """

    def __init__(self, stage: Sft, tokenizer: "Tokenizer", seq_len: int, job: Job):
        from fastlm.data.conversations import Rows

        self.stage, self.seq_len, self.job = stage, seq_len, job
        self.rows = Rows()
        self.encoder = Encoder(stage, tokenizer, job, self.rows.counts)
        self.conversations = self.held_out = 0
        self.training: list[Example] = []
        self.prompts = Prompts()
        heldout: list[tuple[float, Example]] = []
        # per source: its conversations and examples
        self.conversations_of, self.examples_of = [0] * len(stage.data), [0] * len(stage.data)
        for source, conversation in job.track(
            self.read(), "reading conversations", unit="conversations"
        ):
            found = self.encode(conversation)
            if not found:
                continue
            place = place_in_order(conversation)
            if place < stage.heldout:
                self.held_out += 1
                heldout += [(place, example) for example in found]
            else:
                self.conversations += 1
                self.training += found
                self.conversations_of[source] += 1
                self.examples_of[source] += len(found)
            self.prompts.add(place, conversation.prompt(), conversation.tools)
        self.encoder.finish()
        self.heldout = [example for _, example in sorted(heldout, key=lambda pair: pair[0])]

    def read(self) -> Iterator[tuple[int, "Conversation"]]:
        """Yield the conversations, each with the index of its source."""
        from fastlm.data.conversations import read_conversations

        for source, spec in enumerate(self.stage.data):
            for conversation in read_conversations(
                (spec,), cache=self.job.cache, skip_bad=self.stage.skip_bad, rows=self.rows,
                tell=self.job.skipped,
            ):  # fmt: skip
                yield source, conversation

    def encode(self, conversation: "Conversation") -> list[Example]:
        overlong = self.stage.overlong
        whole = self.encoder.encode(
            conversation.messages, conversation.learnt, conversation.tools, conversation.place
        )
        examples = [piece for one in whole for piece in fit(one, self.seq_len, overlong)]
        if any(len(one.ids) > self.seq_len for one in whole):
            self.rows.counts[OVERLONG[overlong][bool(examples)]] += 1
        return examples

    def mixture(self) -> Mixture:
        weights = self.stage.data_weights or (1.0,) * len(self.examples_of)
        return Mixture(tuple(self.examples_of), weights)

    def sources(self, mixture: Mixture) -> list[dict[str, Any]]:
        """What the result says of each source."""
        columns = (self.stage.data, mixture.weights, self.conversations_of, mixture.taken())
        keys = ("source", "weight", "conversations", "examples_per_epoch")
        return [dict(zip(keys, row)) for row in zip(*columns)]

    def told(self) -> str:
        return told_rows(self.rows, self.held_out)
