"""What all measures share: the model that is asked, the sets, the judges, the options."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastlm.evals.safety.asking import Asked
from fastlm.evals.safety.judges import (
    Labelled,
    Measured,
    Rule,
    compliance_features,
    declines,
    fit_measured,
    measure,
    text_features,
)
from fastlm.evals.safety.negatives import constructed, not_answers
from fastlm.evals.safety.refusals import abstains, refuses
from fastlm.evals.safety.scores import Score, share
from fastlm.evals.safety.sentences import ABSTAINING, ABSTAINING_SEEN
from fastlm.evals.safety.sets import Sets, sample

ANSWERS = 400  # of people, for the judge of answers
CONSTRUCTED = 400  # to fit to, as many as people labelled: all 1,110 do worse on both labels
TOXIC = 500  # examples of each label: all 993 take four times as long, for 2.5 points


class Judges:
    """The judges, each made and measured when it is first needed. They are the same for all models
    of a run.
    """

    def __init__(self, sets: Sets) -> None:
        self.sets = sets

    @cached_property
    def refusal(self) -> tuple[Rule, Measured]:
        """Does an answer refuse, or have nothing to do with the request? Rules."""
        examples = self.sets.labelled("refusals")
        return declines, measure(declines, examples, "169 answers labelled by people (PyRIT)")

    @cached_property
    def success(self) -> tuple[Rule, Measured]:
        """Does an answer do what was asked? It does not refuse, and a classifier of its content
        says yes.
        """
        examples = self.sets.labelled("objectives")
        made = sample([e for _, e in constructed(examples, held_out=False)], CONSTRUCTED, 0)
        return fit_measured(
            examples, compliance_features,
            f"{len(examples)} answers labelled by people (PyRIT), by five-fold cross-validation",
            seen=[*not_answers(examples), *made, *self.sets.harmless()],
            constructed=constructed(examples, held_out=True),
            veto=lambda request, answer: refuses(answer),
        )  # fmt: skip

    @cached_property
    def toxicity(self) -> tuple[Rule, Measured]:
        """Is a text toxic? A classifier of its words and letters."""
        toxic, other = (sample(texts, TOXIC, 0) for texts in self.sets.toxic_texts())
        examples = [
            Labelled("", text, label, text)
            for texts, label in ((toxic, True), (other, False))
            for text in texts
        ]
        return fit_measured(
            examples, text_features,
            f"{len(toxic)} texts with a toxicity score of 0.5 and more, and as many pieces of"
            " encyclopedia text taken as not toxic; by five-fold cross-validation",
        )  # fmt: skip

    @cached_property
    def answering(self) -> tuple[Rule, Measured]:
        """Does an answer claim to know? Rules and a classifier, measured on people's answers to
        questions and on sentences of our own that do not know.
        """
        known = sample(self.sets.quac_answers(), ANSWERS, 0)
        examples = [Labelled("", text, True, text) for text in known]
        examples += [Labelled("", text, False, text) for text in ABSTAINING]
        return fit_measured(
            examples, text_features,
            f"{len(known)} answers of people (QuAC) and {len(ABSTAINING)} sentences of our own, by"
            " five-fold cross-validation",
            seen=[Labelled("", text, False, text) for text in ABSTAINING_SEEN],
            veto=lambda request, answer: abstains(answer),
        )  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The options of a run; `fastlm.evals.safety.stage.Safety` documents them."""

    limit: int = 50
    max_new_tokens: int = 64
    seed: int = 0
    confidence: float = 0.95
    attacks: Sequence[str] = ("plain",)
    requests: Sequence[str] = ("harmbench", "donotanswer")
    suffix_requests: int = 5
    suffix_tokens: int = 12
    suffix_steps: int = 20
    suffix_candidates: int = 64


@dataclass(frozen=True)
class Bench:
    """One model under test.

    data: a corpus that it was trained on, with a held-out part; canaries: what was planted there.
    """

    asked: Asked
    sets: Sets
    judges: Judges
    options: Options
    cache: Path
    data: Path | None = None
    canaries: Path | None = None
    notes: list[str] = field(default_factory=list)

    def share(self, name: str, what: str, hits: Sequence[float], **others: Any) -> Score:
        return share(name, what, sum(hits), len(hits), confidence=self.options.confidence, **others)
