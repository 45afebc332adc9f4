"""Supervised fine-tuning: a model learns the assistant's messages of conversations."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.runs.stage import Job, Part, Stage, Takes
from fastlm.train.chat_options import ChatOptions
from fastlm.train.encoding import (
    IGNORE,
    Encoder,
    Example,
    Prompts,
    chat_tokenizer,
    digest,
    fit,
    load_model,
    pack,
    place_in_order,
    reasons,
    told_rows,
    weights_digest,
)
from fastlm.train.epochs import Epochs
from fastlm.train.metrics import METRICS, read_metrics

if TYPE_CHECKING:
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
    """The objective (``fastlm.train.loop.Objective``) of `Sft`: cross-entropy of learnt tokens.

    The loss is a mean over the learnt tokens of the whole step, however they are spread over its
    micro-batches. For the other arguments see `Epochs`.
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
    ):
        super().__init__(
            model, [e.place for e in examples], options, batch_size=batch_size, seed=seed,
            base=base, data=digest(examples), tokenizer=tokenizer, prompt=prompt, device=device,
        )  # fmt: skip
        self.examples, self.heldout = examples, heldout

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
class Sft(ChatOptions, Stage):
    """Fine-tune a model on conversations. It learns the assistant's messages, and to end them.

    The model's own chat template writes the conversations; a model without one that has ChatML's
    tokens gets ChatML. The same command run again resumes from the last checkpoint.
    """

    kind = "sft"
    command = ("sft",)
    reads = {"model": Takes(("model",), "Model to fine-tune: a run, a Hugging Face folder")}
    leaves = {"model": MODEL}
    scratch = ("checkpoints",)
    result = {
        "steps": int, "tokens": int, "tokens_per_second": float, "loss": float | None,
        "parameters": int, "conversations": int, "heldout": int, "read": int, "counts": dict,
        "learnt_tokens": int, "all_tokens": int, "used_seconds": float, "load": str, "prompt": str,
    }  # fmt: skip
    notes = """Read are .jsonl and .json files of rows in the shapes of OpenAI (messages), ShareGPT
(conversations), Alpaca (instruction, input, output) and pairs (prompt, completion)."""

    overlongs = tuple(OVERLONG)

    overlong: Annotated[str, "Longer conversations: skip, truncate or split"] = "skip"

    def run(self, job: Job) -> dict[str, Any]:
        import torch

        from fastlm.train.loop import train

        source = job.path("model")
        model = load_model(source)
        tokenizer = chat_tokenizer(source, model.config.to_dict(), self.chat_template)
        context = model.config.max_position_embeddings
        texts = Encoded(self, tokenizer, self.longest(context), job)
        prompt, asked = texts.prompts.choose(self, tokenizer, context)
        if not texts.training:
            raise InputError(
                f"data: wanted conversations to learn from, got none in {texts.told()}"
            )
        options = self.train_options(len(texts.training))
        base = weights_digest(model)
        model.config.eos_token_id = sorted(model.config.stop_ids | tokenizer.stop_ids)
        objective = AnswerTokens(
            model, texts.training, texts.heldout, options, batch_size=self.batch_size,
            seed=self.seed, base=base, tokenizer=tokenizer, prompt=prompt, device=model.device,
        )  # fmt: skip
        torch.manual_seed(self.seed)
        load = os.getloadavg()[0]
        done = train(objective, options, job.out, track=job.track, on_event=job.on_event)
        model.save_pretrained(job.out / MODEL)
        tokenizer.save(job.out / MODEL)
        result = asdict(done)
        result["used_seconds"] = result.pop("seconds")
        return {
            **result,
            "parameters": sum(p.numel() for p in model.parameters()),
            "conversations": texts.conversations,
            "heldout": texts.held_out,
            "read": texts.rows.read,
            "counts": dict(texts.rows.counts),
            "learnt_tokens": sum(example.learnt for example in texts.training),
            "all_tokens": sum(len(example.ids) for example in texts.training),
            "prompt": asked,
            "load": f"{load:.1f} when the training began, {os.getloadavg()[0]:.1f} when it ended",
        }

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        loss = "no loss" if result["loss"] is None else f"loss {result['loss']:.4f}"
        return (
            f"{result['conversations']:,} conversations, {result['steps']} steps, {loss},"
            f" {result['tokens_per_second']:,.0f} learnt tokens/s: {job.out / MODEL}"
        )

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        from fastlm.runs.charts import loss_chart
        from fastlm.runs.text import count_text, seconds_text

        metrics = read_metrics(job.out / METRICS)
        learnt, whole = result["learnt_tokens"], result["all_tokens"]
        rows = f"{result['read']:,} rows, {result['heldout']:,} held out"
        if result["counts"]:
            rows += f"; {reasons(result['counts'])}"
        return Part(
            "Fine-tuning",
            "The loss is of the assistant's tokens alone.",
            facts={
                "conversations": rows,
                "learnt": f"{count_text(learnt)} of {count_text(whole)} tokens"
                f" ({100 * learnt / whole:.0f} %)",
                "batch": f"{self.batch_size * self.accumulate} conversations without padding",
                "schedule": f"AdamW, {self.schedule}, peak {self.lr}, weight decay"
                f" {self.weight_decay}, {self.dtype}",
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
        from fastlm.data.conversations import Rows, read_conversations

        self.stage, self.seq_len = stage, seq_len
        self.rows = Rows()
        self.encoder = Encoder(stage, tokenizer, job, self.rows.counts)
        self.conversations = self.held_out = 0
        self.training: list[Example] = []
        self.prompts = Prompts()
        heldout: list[tuple[float, Example]] = []
        read = read_conversations(
            stage.data, cache=job.cache, skip_bad=stage.skip_bad, rows=self.rows, tell=job.skipped
        )
        for conversation in job.track(read, "reading conversations", unit="conversations"):
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
            self.prompts.add(place, conversation.prompt(), conversation.tools)
        self.encoder.finish()
        self.heldout = [example for _, example in sorted(heldout, key=lambda pair: pair[0])]

    def encode(self, conversation: "Conversation") -> list[Example]:
        overlong = self.stage.overlong
        whole = self.encoder.encode(
            conversation.messages, conversation.learnt, conversation.tools, conversation.place
        )
        examples = [piece for one in whole for piece in fit(one, self.seq_len, overlong)]
        if any(len(one.ids) > self.seq_len for one in whole):
            self.rows.counts[OVERLONG[overlong][bool(examples)]] += 1
        return examples

    def told(self) -> str:
        return told_rows(self.rows, self.held_out)
