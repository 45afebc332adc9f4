"""Preferences as tokens, and the options of their loss: what `dpo` and `reward` share."""

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
    from fastlm.data.preferences import Comparison, LabelledAnswer

# What happens to longer answers -> how their row is counted: where it is lost, else
TRUNCATION_COUNTS = {
    "skip": ("too long", "too long"),
    "truncate": ("nothing left to learn", "truncated"),
}


# option of the loss -> the losses that use it
LOSS_OPTIONS = {
    "label_smoothing": ("sigmoid",),
    "length_normalise": ("sigmoid", "ipo", "hinge"),
    "sft_weight": ("sigmoid", "ipo", "hinge"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of `dpo`, see `fastlm.train.losses.dpo_loss` and `kto_loss`."""

    loss_type: Annotated[str, "sigmoid (DPO), ipo, hinge or kto"] = "sigmoid"
    beta: Annotated[float, "Scale of the log-ratios; larger stays closer to the base"] = 0.1
    label_smoothing: Annotated[float, "Share of pairs taken to be wrong (cDPO), below 0.5"] = 0.0
    length_normalise: Annotated[bool, "Divide the log-ratio of an answer by its length"] = False
    sft_weight: Annotated[float, "Weight of the chosen answers' loss per token, beside"] = 0.0
    desirable_weight: Annotated[float, "Weight of desirable answers (kto)"] = 1.0
    undesirable_weight: Annotated[float, "Weight of undesirable answers (kto)"] = 1.0

    def check_loss(self) -> None:
        one_of(self, loss_type=("sigmoid", "ipo", "hinge", "kto"))
        positive(self, "beta")
        smoothing = self.label_smoothing
        expect(0 <= smoothing < 0.5, "label_smoothing", "a number in [0, 0.5)", smoothing)
        not_negative(self, "sft_weight", "desirable_weight", "undesirable_weight")
        for name, losses in LOSS_OPTIONS.items():
            value = getattr(self, name)
            expect(
                self.loss_type in losses or value == getattr(PreferenceLoss, name), name,
                f"none with loss_type = {self.loss_type!r}",
                f"{value} (it serves {', '.join(losses)})",
            )  # fmt: skip


@dataclass(frozen=True)
class PreferenceStage(ChatStage):
    """A stage that learns from preferences: what `dpo` and `reward` share."""

    row_name = "preferences"
    feedback_format = "preferences"

    gradient_accumulation_steps: Annotated[int, "Micro-batches per step"] = 4
    heldout: Annotated[float, "Share of the data that is held out"] = 0.1

    def figures(self, result: Mapping[str, Any]) -> list[str]:
        """Return loss and accuracy, for the user."""
        metrics, figures = result["metrics"], [loss_text(result)]
        if "val_accuracy" in metrics:
            accuracy, error = metrics["val_accuracy"], metrics["val_accuracy_error"]
            figures.append(f"held-out accuracy {100 * accuracy:.1f} % +- {100 * error:.1f}")
        return figures

    def cards(self, result: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the accuracy, for the top of the report."""
        metrics = result["metrics"]
        if "val_accuracy" not in metrics:
            return []
        accuracy, error = (100 * metrics[f"val_accuracy{name}"] for name in ("", "_error"))
        return [(f"{accuracy:.0f} ± {error:.0f} %", "of held-out answers ranked right")]


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """Answers to one prompt, each with the prompt and up to the token that ends it.

    Of a pair: chosen and rejected. Of a ranked list: best first. Of a label: the answer, and the
    same prompt with the answer to another prompt. ``margin`` of a pair, ``desirable`` of a label.
    """

    answers: tuple[Example, ...]
    margin: float | None = None
    desirable: bool = True

    @property
    def location(self) -> str:
        return self.answers[0].location

    def content(self) -> bytes:
        return f"{examples_digest(self.answers)} {self.margin} {self.desirable}\n".encode()


class PreferenceDataset(EncodedDataset):
    """The preferences of a stage as tokens.

    ``kind`` says what is made of a row:

    - "pairs": every pair of answers of which one is better;
    - "lists": one entry per row, or every pair where answers of a longer row are tied;
    - "labels": the answers with their labels. The best and the worst answer of a comparison are a
      desirable and an undesirable one.

    Labels are refused where pairs or lists are wanted.
    """

    def __init__(self, *args: Any, kind: Literal["pairs", "lists", "labels"]):
        self.kind = kind
        super().__init__(*args)
        if kind == "labels":
            both = add_mismatched_answers([*self.training, *self.heldout], self.max_length)
            learnt = len(self.training)
            self.training, self.heldout = both[:learnt], both[learnt:]

    def read(self) -> "Iterator[Comparison | LabelledAnswer]":
        from fastlm.data.preferences import read_preferences

        return read_preferences(self.stage.data, **self.reader_options())

    def prompt_of(self, row: "Comparison | LabelledAnswer") -> Any:
        from fastlm.data.preferences import LabelledAnswer

        first = row.conversation() if isinstance(row, LabelledAnswer) else row.conversation(0)
        return first, row.prompt, row.tools

    def encode(self, row: "Comparison | LabelledAnswer") -> list[PreferenceExample]:
        return list(self._judged(row))

    def _judged(self, row: "Comparison | LabelledAnswer") -> Iterator[PreferenceExample]:
        from fastlm.data.preferences import LabelledAnswer

        if isinstance(row, LabelledAnswer) and self.kind != "labels":
            raise InputError(
                f"{row.location}: expected a comparison of answers, got one answer with a label"
                " (for loss_type = 'kto' of the stage dpo)"
            )
        if self.kind == "labels":
            labels = [row] if isinstance(row, LabelledAnswer) else row.labels()
            for label in labels:
                for answer in self._encode([label.conversation()]):
                    yield PreferenceExample((answer,), desirable=label.desirable)
            return
        assert not isinstance(row, LabelledAnswer)
        answers = self._encode([row.conversation(i) for i in range(len(row.answers))])
        if not answers:
            return
        tied = len(set(row.ranks)) < len(row.ranks)
        if self.kind == "lists" and not tied:
            order = sorted(range(len(answers)), key=row.ranks.__getitem__)
            parts = [(tuple(answers[i] for i in order), row.margin)]
        else:
            parts = [
                ((answers[i], answers[j]), _margin(row, i, j))
                for i in range(len(answers))
                for j in range(len(answers))
                if row.ranks[i] < row.ranks[j]
            ]
        for chosen, margin in parts:
            if len({answer.ids.tobytes() for answer in chosen}) == len(chosen):
                yield PreferenceExample(chosen, margin)
            elif max(len(answer.ids) for answer in chosen) == self.max_length:
                self.rows.by_reason["equal after truncation"] += 1
            else:
                error = "expected different answers, got two that the chat template writes alike"
                self.refuse(InputError(error), row.location)

    def _encode(self, conversations: "Sequence[Conversation]") -> list[Example]:
        """One example per conversation; none at all if one of them is left out."""
        whole: list[Example] = []
        for conversation in conversations:
            found = self.encode_messages(conversation)
            if len(found) > 1:
                error = InputError(
                    "chat_template: expected one that writes the messages of an answer as they"
                    f" stay, got one that changes them, in an answer of {len(found)} messages"
                )
                self.refuse(error, conversation.location)
                return []
            if not found:
                return []
            # without what the template writes after the answer's last token
            whole.append(found[0][: int(found[0].loss_mask.nonzero()[0][-1]) + 1])
        cut = [
            piece for e in whole for piece in truncate(e, self.max_length, self.stage.truncation)
        ]
        if any(len(e.ids) > self.max_length for e in whole):
            self.rows.by_reason[
                TRUNCATION_COUNTS[self.stage.truncation][len(cut) == len(whole)]
            ] += 1
        return cut if len(cut) == len(whole) else []


def _margin(row: "Comparison", better: int, worse: int) -> float | None:
    if row.scores is not None and len(row.answers) > 2:
        return row.scores[better] - row.scores[worse]
    return row.margin


def add_mismatched_answers(
    labelled: Sequence[PreferenceExample], max_length: int
) -> list[PreferenceExample]:
    """Give each labelled answer the same prompt with an answer to another prompt: the next one in
    the order of ``labelled``, from its beginning again after the last. InputError: there is only
    one prompt.

    KTO's reference point is a mean over such answers. They are fixed here, once, so that their
    reference log-probabilities are measured once too.
    """
    import numpy as np

    starts = [int(one.answers[0].loss_mask.argmax()) for one in labelled]
    prompts = [one.answers[0].ids[:n].tobytes() for one, n in zip(labelled, starts)]
    if labelled and len(set(prompts)) == 1:
        raise InputError("data: expected answers to two prompts or more for kto, got one prompt")
    result, after = [], 1
    for i, one in enumerate(labelled):
        after = max(after, i + 1)
        while prompts[after % len(labelled)] == prompts[i]:
            after += 1
        (own,), other = one.answers, after % len(labelled)
        parts = (own[: starts[i]], labelled[other].answers[0][starts[other] :])
        ids, mask = (
            np.concatenate([getattr(e, key) for e in parts]) for key in ("ids", "loss_mask")
        )
        swapped = truncate(Example(ids, mask, own.location), max_length, "truncate")
        result.append(PreferenceExample((own, *swapped), desirable=one.desirable))
    return result


def right(margins: "Tensor") -> "Tensor":
    """1 where a margin is positive, 0 where it is negative; a tie is half right."""
    return (margins.sign() + 1) / 2


def accuracy_error(right: "Tensor", places: Sequence[str]) -> float:
    """The standard error of the mean of ``right``, one per pair. Pairs of one row (``places``) are
    not independent. 0 where it cannot be estimated, from the pairs of a single row.
    """
    from fastlm.stats.intervals import mean_error  # numpy

    if len({*places}) < 2:
        return 0.0
    return mean_error(right.cpu().numpy(), clusters=places).error


def pairwise_accuracy(better: "Tensor", worse: "Tensor") -> tuple[float, float]:
    """The share of all pairs (one of each) in which the better one is higher, and its standard
    error (DeLong et al. 1988; 0 where it cannot be estimated). (0.5, 0) without pairs.
    """
    wins = right(better[:, None] - worse[None])
    if not wins.numel():
        return 0.5, 0.0
    sides = [wins.mean(1 - side) for side in (0, 1)]
    variance = sum(float(side.var()) / len(side) for side in sides if len(side) > 1)
    return float(wins.mean()), math.sqrt(variance)
