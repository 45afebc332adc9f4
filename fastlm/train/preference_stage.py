"""Encode preferences as tokens, for `dpo` and `reward`, and the options of their losses."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastlm.errors import InputError
from fastlm.pipeline.stage import not_negative, one_of, positive
from fastlm.train.encoding import EncodedDataset
from fastlm.train.objective import Example, examples_digest, truncate
from fastlm.train.options import expect
from fastlm.train.training_stage import ChatStage, loss_text

if TYPE_CHECKING:
    from torch import Tensor

    from fastlm.data.conversations import Conversation
    from fastlm.data.preferences import Comparison, UnpairedPreference

# truncation -> the count of a row with too long answers: if it is lost, if it is not
TRUNCATION_COUNTS = {
    "skip": ("too long", "too long"),
    "truncate": ("nothing left to learn", "truncated"),
}


# losses that do not compare the model with a reference; they divide log-probabilities by lengths
REFERENCE_FREE = ("simpo", "orpo")
# option of the loss -> the losses that use it
LOSS_OPTIONS = {
    "label_smoothing": ("sigmoid", "simpo"),
    "length_normalise": ("sigmoid", "ipo", "hinge"),
    "simpo_gamma": ("simpo",),
    "sft_weight": ("sigmoid", "ipo", "hinge", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


@dataclass(frozen=True)
class DPOOptions:
    """The options of `dpo`'s loss; see `dpo_loss`, `simpo_loss`, `orpo_loss` and `kto_loss` in
    `fastlm.train.losses`.
    """

    loss_type: Annotated[str, "Use the loss sigmoid (DPO), ipo, hinge, simpo, orpo or kto"] = (
        "sigmoid"
    )
    beta: Annotated[
        float,
        "Scale the log-ratios by this; a larger one keeps the model closer to its base (simpo:"
        " scale log-probabilities; orpo: weight the odds ratio)",
    ] = 0.1
    simpo_gamma: Annotated[float, "Require this margin between the rewards of a pair (simpo)"] = 0.5
    label_smoothing: Annotated[float, "Assume this share of wrong pairs (cDPO), below 0.5"] = 0.0
    length_normalise: Annotated[bool, "Divide the log-ratio of an answer by its length"] = False
    sft_weight: Annotated[
        float, "Add the cross-entropy loss of the chosen answers with this weight"
    ] = 0.0
    desirable_weight: Annotated[float, "Give desirable answers this weight (kto)"] = 1.0
    undesirable_weight: Annotated[float, "Give undesirable answers this weight (kto)"] = 1.0

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares the model with the model before training."""
        return self.loss_type not in REFERENCE_FREE

    def check_loss(self) -> None:
        """Check the values. InputError names the option."""
        one_of(self, loss_type=("sigmoid", "ipo", "hinge", *REFERENCE_FREE, "kto"))
        positive(self, "beta")
        smoothing = self.label_smoothing
        expect(0 <= smoothing < 0.5, "label_smoothing", "a number in [0, 0.5)", smoothing)
        not_negative(self, "simpo_gamma", "sft_weight", "desirable_weight", "undesirable_weight")
        for name, losses in LOSS_OPTIONS.items():
            value = getattr(self, name)
            expect(
                self.loss_type in losses or value == getattr(DPOOptions, name), name,
                f"none with loss_type = {self.loss_type!r}",
                f"{value} (an option of {', '.join(losses)})",
            )  # fmt: skip


@dataclass(frozen=True)
class PreferenceStage(ChatStage):
    """The base class of stages that train on preferences: `dpo` and `reward`."""

    row_name = "preferences"
    feedback_format = "preferences"
    # loss is second: its scale depends on the options of the loss
    validation_metrics = {"val_accuracy": True, "val_loss": False}

    gradient_accumulation_steps: Annotated[
        int, "Accumulate gradients over this many micro-batches per step"
    ] = 4
    heldout: Annotated[float, "Hold out this share of the data"] = 0.1

    def figures(self, result: Mapping[str, Any]) -> list[str]:
        """Return loss and accuracy, for the summary."""
        metrics, figures = result["metrics"], [loss_text(result)]
        if "val_accuracy" in metrics:
            accuracy, error = metrics["val_accuracy"], metrics["val_accuracy_error"]
            figures.append(f"held-out accuracy {100 * accuracy:.1f} % +- {100 * error:.1f}")
        return figures

    def cards(self, result: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the accuracy, as a card of the report."""
        metrics = result["metrics"]
        if "val_accuracy" not in metrics:
            return []
        accuracy, error = (100 * metrics[f"val_accuracy{name}"] for name in ("", "_error"))
        return [(f"{accuracy:.0f} ± {error:.0f} %", "of held-out answers ranked right")]


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """Ranked or labelled answers to one prompt, each with the prompt and up to its last token.

    For a pair: chosen and rejected. For a ranked list: best first. For a label: the answer, and the
    same prompt with the answer to another prompt. Pairs may have a ``margin``; labels are
    ``desirable`` or not.
    """

    answers: tuple[Example, ...]
    margin: float | None = None
    desirable: bool = True

    @property
    def location(self) -> str:
        """File and line of the row."""
        return self.answers[0].location

    def content(self) -> bytes:
        """Return the bytes that identify the example."""
        return f"{examples_digest(self.answers)} {self.margin} {self.desirable}\n".encode()


class PreferenceDataset(EncodedDataset):
    """The preferences of a stage as tokens.

    ``form``: the examples that a row yields.

    - "pairs": every pair of answers of which one is better;
    - "lists": one example per row, or every pair if answers of a longer row are tied;
    - "labels": the answers with their labels. The best and the worst answer of a comparison become
      a desirable and an undesirable one.

    InputError: a label in data for pairs or lists.
    """

    def __init__(self, *args: Any, form: Literal["pairs", "lists", "labels"]):
        self.form = form
        super().__init__(*args)
        if form == "labels":
            examples = add_mismatched_answers([*self.training, *self.heldout], self.max_length)
            count = len(self.training)
            self.training, self.heldout = examples[:count], examples[count:]

    def read(self) -> "Iterator[Comparison | UnpairedPreference]":
        from fastlm.data.preferences import read_preferences

        return read_preferences(self.stage.data, **self.reader_options())

    def prompt_of(self, row: "Comparison | UnpairedPreference") -> Any:
        from fastlm.data.preferences import UnpairedPreference

        conversation = (
            row.conversation() if isinstance(row, UnpairedPreference) else row.conversation(0)
        )
        return conversation, row.prompt, row.tools

    def encode(self, row: "Comparison | UnpairedPreference") -> list[PreferenceExample]:
        return list(self._examples(row))

    def _examples(self, row: "Comparison | UnpairedPreference") -> Iterator[PreferenceExample]:
        from fastlm.data.preferences import UnpairedPreference

        if isinstance(row, UnpairedPreference) and self.form != "labels":
            raise InputError(
                f"{row.location}: expected a comparison of answers, got one answer with a label"
                " (for loss_type = 'kto' of the stage dpo)"
            )
        if self.form == "labels":
            labels = [row] if isinstance(row, UnpairedPreference) else row.labels()
            for label in labels:
                for answer in self._encode([label.conversation()]):
                    yield PreferenceExample((answer,), desirable=label.desirable)
            return
        assert not isinstance(row, UnpairedPreference)
        answers = self._encode([row.conversation(i) for i in range(len(row.answers))])
        if not answers:
            return
        tied = len(set(row.ranks)) < len(row.ranks)
        if self.form == "lists" and not tied:
            order = sorted(range(len(answers)), key=row.ranks.__getitem__)
            parts = [(tuple(answers[i] for i in order), row.margin)]
        else:
            parts = [
                ((answers[i], answers[j]), _margin(row, i, j))
                for i in range(len(answers))
                for j in range(len(answers))
                if row.ranks[i] < row.ranks[j]
            ]
        for ranked, margin in parts:
            if len({answer.ids.tobytes() for answer in ranked}) == len(ranked):
                yield PreferenceExample(ranked, margin)
            elif max(len(answer.ids) for answer in ranked) == self.max_length:
                self.rows.by_reason["equal after truncation"] += 1
            else:
                error = "expected different answers, got two that the chat template renders alike"
                self.refuse(InputError(error), row.location)

    def _encode(self, conversations: "Sequence[Conversation]") -> list[Example]:
        """Return one example per conversation, or none if one of them is left out."""
        examples: list[Example] = []
        for conversation in conversations:
            parts = self.encode_messages(conversation)
            if len(parts) > 1:
                error = InputError(
                    "chat_template: expected one that does not change the messages of an answer"
                    f" later, got one that does, in an answer of {len(parts)} messages"
                )
                self.refuse(error, conversation.location)
                return []
            if not parts:
                return []
            # without what the template writes after the answer's last token
            examples.append(parts[0][: int(parts[0].loss_mask.nonzero()[0][-1]) + 1])
        truncation = self.stage.truncation
        cut = [piece for e in examples for piece in truncate(e, self.max_length, truncation)]
        if any(len(e.ids) > self.max_length for e in examples):
            self.rows.by_reason[TRUNCATION_COUNTS[truncation][len(cut) == len(examples)]] += 1
        return cut if len(cut) == len(examples) else []


def _margin(row: "Comparison", better: int, worse: int) -> float | None:
    if row.scores is not None and len(row.answers) > 2:
        return row.scores[better] - row.scores[worse]
    return row.margin


def add_mismatched_answers(
    labelled: Sequence[PreferenceExample], max_length: int
) -> list[PreferenceExample]:
    """Add to each labelled answer a mismatched one: the same prompt with the answer to another
    prompt. That is the next one in the order of ``labelled``, which starts over after the last.
    InputError: there is only one prompt.

    KTO's reference point is a mean over such answers. They are fixed here once, so that their
    reference log-probabilities are measured once too.
    """
    import numpy as np

    starts = [int(e.answers[0].loss_mask.argmax()) for e in labelled]
    prompts = [e.answers[0].ids[:n].tobytes() for e, n in zip(labelled, starts)]
    if labelled and len(set(prompts)) == 1:
        raise InputError("data: expected answers to two prompts or more for kto, got one prompt")
    result, next_index = [], 1
    for i, example in enumerate(labelled):
        next_index = max(next_index, i + 1)
        while prompts[next_index % len(labelled)] == prompts[i]:
            next_index += 1
        (answer,), other = example.answers, next_index % len(labelled)
        parts = (answer[: starts[i]], labelled[other].answers[0][starts[other] :])
        ids, mask = (
            np.concatenate([getattr(e, key) for e in parts]) for key in ("ids", "loss_mask")
        )
        mismatched = truncate(Example(ids, mask, answer.location), max_length, "truncate")
        result.append(PreferenceExample((answer, *mismatched), desirable=example.desirable))
    return result


def margin_accuracy(margins: "Tensor") -> "Tensor":
    """Return 1 where a margin is positive, 0 where it is negative, and 0.5 for a tie."""
    return (margins.sign() + 1) / 2


def accuracy_error(accuracy: "Tensor", locations: Sequence[str]) -> float:
    """Return the standard error of the mean of ``accuracy``, one value per pair. Pairs of one row
    (``locations``) are not independent. The error is 0 where it cannot be estimated, from the pairs
    of a single row.
    """
    from fastlm.stats.intervals import mean_error  # numpy

    if len({*locations}) < 2:
        return 0.0
    return mean_error(accuracy.cpu().numpy(), clusters=locations).error


def pairwise_accuracy(better: "Tensor", worse: "Tensor") -> tuple[float, float]:
    """Return the share of all pairs (one of each side) in which the better one is higher, and its
    standard error (DeLong et al. 1988; 0 if it cannot be estimated). Without pairs: (0.5, 0).
    """
    wins = margin_accuracy(better[:, None] - worse[None])
    if not wins.numel():
        return 0.5, 0.0
    sides = [wins.mean(1 - side) for side in (0, 1)]
    variance = sum(float(side.var()) / len(side) for side in sides if len(side) > 1)
    return float(wins.mean()), math.sqrt(variance)
