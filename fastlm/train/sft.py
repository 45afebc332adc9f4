"""Supervised fine-tuning: a model learns the assistant's messages of conversations."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.data.content import Contents
from fastlm.data.conversations import FORMATS
from fastlm.data.sources import NAMED_LINES as NAMED
from fastlm.errors import InputError
from fastlm.runs.stage import Facts, Job, Part, Positional, Stage, Takes, at_least_one
from fastlm.train.best import taken
from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.options import OPTIMIZERS, TrainOptions

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from fastlm.data.conversations import Conversation
    from fastlm.tokenizer.tokenizer import Tokenizer

    Batch = tuple[Tensor, Tensor, Tensor]  # input_ids, shift_labels (1, total), cu_seqlens

MODEL = "model"
IGNORE = -100
# What happens to a longer conversation -> how it is counted: with nothing left to learn, else
OVERLONG = {
    "skip": ("too long", "too long in part"),  # in part: it gave an example per answer
    "truncate": ("nothing left to learn", "truncated"),
    "split": ("nothing left to learn", "split"),
}
LONGEST = 2048  # tokens of a conversation by default, where the context is longer: bounds memory


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as tokens: ``ids`` int32, ``mask`` bool, which of them are learnt. ``place``:
    its file and line.
    """

    ids: "np.ndarray"
    mask: "np.ndarray"
    place: str = ""

    @property
    def learnt(self) -> int:
        """Tokens with a loss: the first token of an example is never predicted."""
        return int(self.mask[1:].sum())


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
            Example(example.ids[i : i + seq_len], example.mask[i : i + seq_len], example.place)
            for i in starts
        ]
    return [piece for piece in pieces if piece.learnt]


def pack(examples: Sequence[Example]) -> "Batch":
    """Join examples without padding: attention stays inside each (``cu_seqlens``), and only learnt
    tokens have labels.
    """
    import numpy as np
    import torch

    ids = np.concatenate([e.ids[:-1] for e in examples]).astype(np.int64)
    labels = np.concatenate([np.where(e.mask[1:], e.ids[1:], IGNORE) for e in examples])
    ends = np.cumsum([0, *(len(e.ids) - 1 for e in examples)], dtype=np.int32)
    packed = (ids[None], labels.astype(np.int64)[None], ends)
    one, two, three = map(torch.from_numpy, packed)
    return one, two, three


class AnswerTokens:
    """The objective (``fastlm.train.loop.Objective``) of `Sft`: cross-entropy of learnt tokens.

    An epoch takes every example once, in an order that depends only on ``seed`` and the epoch. Its
    last step is smaller where the examples do not fill it. The loss is a mean over the learnt
    tokens of the whole step, however they are spread over its micro-batches.

    ``base`` identifies the weights that training began with. ``prompt``: ids that a sample answers.
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
        base: str,
        tokenizer: "Tokenizer | None",
        prompt: Sequence[int],
        device: "torch.device",
    ):
        self.trained = model
        self.examples, self.heldout, self.options = examples, heldout, options
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.base, self.tokenizer, self.prompt = base, tokenizer, prompt
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
        return {
            "base": self.base,
            "data": self.data,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def next_batches(self, count: int) -> "list[Batch]":
        """Return ``count`` micro-batches, or what the epoch has left."""
        if self.at == len(self.order):
            self._begin(self.epoch + 1)
        batches = []
        while len(batches) < count and self.at < len(self.order):
            batches.append(self._packed(self._next(self.batch_size)))
            self.at += self.batch_size
        self.at = min(self.at, len(self.order))
        return batches

    def _next(self, count: int) -> list[Example]:
        return [self.examples[i] for i in self.order[self.at : self.at + count]]

    def _packed(self, examples: Sequence[Example]) -> "Batch":
        ids, labels, cu_seqlens = pack(examples)
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
        if self.at == len(self.order):
            self._begin(self.epoch + 1)
        return f"epoch {self.epoch}, from example {self.at}, {self._next(1)[0].place}"

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin(int(state["epoch"]))
        self.at = int(state["at"])

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

    def sample(self) -> str | None:
        import torch

        if self.tokenizer is None or not self.options.sample_tokens or not self.prompt:
            return None
        tokens = self.trained.generate(  # type: ignore[operator]
            torch.tensor([self.prompt], device=self.device),
            max_new_tokens=self.options.sample_tokens, temperature=0.0,
            stop_ids=tuple(self.tokenizer.stop_ids),
        )  # fmt: skip
        return self.tokenizer.decode(tokens[0, len(self.prompt) :].tolist())


def _digest(examples: Sequence[Example]) -> str:
    import numpy as np

    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.int64(len(example.ids)).tobytes())
        digest.update(example.ids.tobytes())
        digest.update(example.mask.tobytes())
    return digest.hexdigest()[:16]


def weights_digest(model: "nn.Module") -> str:
    """Identify a model's float32 weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def place_in_order(conversation: "Conversation") -> float:
    """A number in [0, 1) from a hash of the prompt. Those below `heldout` are held out: the part
    of a row does not depend on other rows, and conversations with one prompt are on one side.
    """
    digest = hashlib.sha256(conversation.key().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
        "parameters": int, "conversations": int, "heldout": int, "read": int, "counts": dict,
        "learnt_tokens": int, "all_tokens": int, "used_seconds": float, "load": str, "prompt": str,
    }  # fmt: skip
    notes = """Read are .jsonl and .json files of rows in the shapes of OpenAI (messages), ShareGPT
(conversations), Alpaca (instruction, input, output) and pairs (prompt, completion)."""

    data: Annotated[
        tuple[str, ...],
        Positional("Conversations: .jsonl or .json files, folders, pypi:, sdist: or deb:NAME#GLOB"),
    ] = ()
    epochs: Annotated[float | None, "Passes over the data; default: 1 if nothing else ends"] = None
    batch_size: Annotated[int, "Conversations per micro-batch, joined without padding"] = 8
    seq_len: Annotated[
        int | None, "Most tokens per conversation; default: the context, at most 2048"
    ] = None
    overlong: Annotated[str, "Longer conversations: skip, truncate or split"] = "skip"
    skip_bad: Annotated[bool, "Count bad rows instead of stopping at the first one"] = False
    date: Annotated[str, "What chat templates take for today, YYYY-MM-DD"] = "2024-07-26"
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
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"epochs: wanted a positive number, got {self.epochs}")
        self.train_options(1).check()
        if not 0 <= self.heldout < 1:
            raise InputError(f"heldout: wanted a share in [0, 1), got {self.heldout}")
        if self.overlong not in OVERLONG:
            raise InputError(
                f"overlong: wanted one of {', '.join(OVERLONG)}, got {self.overlong!r}"
            )
        try:
            day = date.fromisoformat(self.date).isoformat()
        except ValueError:
            day = ""
        if day != self.date:
            raise InputError(f"date: wanted YYYY-MM-DD, got {self.date!r}")
        if self.seed < 0:
            raise InputError(f"seed: wanted 0 or more, got {self.seed}")

    def train_options(self, examples: int) -> TrainOptions:
        """The options of the loop, with `epochs` as a number of steps."""
        options = self.loop_options()
        epochs = self.epochs
        if epochs is None and not (self.max_steps is self.max_seconds is self.max_tokens is None):
            return options
        if self.batch_warmup:  # the number of steps of an epoch would depend on itself
            raise InputError(
                "batch_warmup: wanted 0 where epochs end the training (max_tokens or max_steps do"
                f" without), got {self.batch_warmup}"
            )
        batches = math.ceil(examples / self.batch_size)
        steps = math.ceil((epochs or 1.0) * math.ceil(batches / self.accumulate))
        most = steps if self.max_steps is None else self.max_steps
        return replace(options, max_steps=min(steps, most))

    def plan(self, inputs: Mapping[str, Sequence[Facts]]) -> Facts:
        return inputs["model"][0]

    def identity(self) -> dict[str, Any]:
        return {k: v for k, v in super().identity().items() if k != "chat_template"}

    def contents(self, contents: Contents) -> Any:
        template = contents.tree(self.chat_template) if self.chat_template else None
        return [contents.sources(self.data, FORMATS), template]

    def run(self, job: Job) -> dict[str, Any]:
        import torch

        from fastlm.model.causal_lm import CausalLM
        from fastlm.train.loop import train

        source = job.path("model")
        model = CausalLM.from_pretrained(source, dtype=torch.float32, keep_quantized=False)
        tokenizer = self.tokenizer(source, model)
        context = model.config.max_position_embeddings
        if self.seq_len is not None and self.seq_len > context:
            raise InputError(
                f"seq_len: wanted at most the model's context {context}, got {self.seq_len}"
            )
        texts = Encoded(self, tokenizer, self.seq_len or min(context, LONGEST), job)
        prompt = texts.prompt(context)
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
            "prompt": texts.asked,
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
            if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens:
                raise InputError(
                    "chat_template: wanted one, since the model has neither a template nor"
                    " ChatML's tokens <|im_start|> and <|im_end|>"
                )
            tokenizer.chat_template = CHATML
        tokenizer.check_learnable()
        return tokenizer

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        loss = "no loss" if result["loss"] is None else f"loss {result['loss']:.4f}"
        return (
            f"{result['conversations']:,} conversations, {result['steps']} steps, {loss},"
            f" {result['tokens_per_second']:,.0f} learnt tokens/s{taken(result, self.take)}:"
            f" {job.out / MODEL}"
        )

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        from fastlm.runs.charts import loss_chart
        from fastlm.runs.text import count_text, seconds_text

        metrics = read_metrics(job.out / METRICS)
        learnt, whole = result["learnt_tokens"], result["all_tokens"]
        rows = f"{result['read']:,} rows, {result['heldout']:,} held out"
        if result["counts"]:
            rows += f"; {_reasons(result['counts'])}"
        return Part(
            "Fine-tuning",
            "The loss is of the assistant's tokens alone.",
            facts={
                "conversations": rows,
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
        from fastlm.data.conversations import Rows, read_conversations

        self.stage, self.tokenizer, self.seq_len, self.job = stage, tokenizer, seq_len, job
        self.rows = Rows()
        self.conversations = self.held_out = self.refused = 0
        self.training: list[Example] = []
        self.prompts: list[tuple[float, list[dict[str, Any]], list[Any] | None]] = []
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
            # the first prompts in order, held-out ones first, for a sample
            self.prompts.append((place, conversation.prompt(), conversation.tools))
            self.prompts = sorted(self.prompts, key=lambda prompt: prompt[0])[:8]
        if self.refused > NAMED:
            job.skipped(f"{self.refused - NAMED:,} more that the chat template refuses")
        self.heldout = [example for _, example in sorted(heldout, key=lambda pair: pair[0])]
        self.asked = ""

    def encode(self, conversation: "Conversation") -> list[Example]:
        import numpy as np

        counts, overlong = self.rows.counts, self.stage.overlong
        variables = {} if conversation.tools is None else {"tools": conversation.tools}
        try:
            encoded = self.tokenizer.encode_conversation(
                conversation.messages, conversation.learnt, date=self.stage.date, **variables
            )
        except InputError as error:
            refusal = InputError(f"{conversation.place}: {error}")
            if not self.stage.skip_bad:
                raise refusal from None
            counts["refused by the chat template"] += 1
            self.refused += 1
            if self.refused <= NAMED:
                self.job.skipped(str(refusal))
            return []
        examples = []
        for ids, mask in encoded:
            whole = Example(np.array(ids, np.int32), np.array(mask), conversation.place)
            examples += fit(whole, self.seq_len, overlong)
        if any(len(ids) > self.seq_len for ids, _ in encoded):
            counts[OVERLONG[overlong][bool(examples)]] += 1
        return examples

    def prompt(self, context: int) -> list[int]:
        """The ids that samples answer: the stage's prompt, or the first one that leaves room."""
        room = context - self.stage.sample_tokens
        given = self.stage.sample_prompt
        choices = [(0.0, [{"role": "user", "content": given}], None)] if given else self.prompts
        for _, messages, tools in choices:
            variables: dict[str, Any] = {} if tools is None else {"tools": tools}
            ids = self.tokenizer.encode_chat(messages, date=self.stage.date, **variables)
            if len(ids) <= room:
                self.asked = messages[-1]["content"]
                return ids
        if given and self.stage.sample_tokens:
            raise InputError(
                f"sample_prompt: wanted at most {room} tokens, which leave room for sample_tokens"
                f" {self.stage.sample_tokens}, got more"
            )
        return []

    def told(self) -> str:
        found = f"{self.rows.read:,} rows"
        reasons = [f"{self.held_out:,} held out"] if self.held_out else []
        reasons += [_reasons(self.rows.counts)] if self.rows.counts else []
        return f"{found} ({', '.join(reasons)})" if reasons else found


def _reasons(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
