"""What the database has of a period: measures of answers, and opinions about them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa

from fastlm.errors import InputError
from fastlm.serve.feedback_rows import read_metrics, read_time
from fastlm.serve.responses import latest
from fastlm.serve.tables import FEEDBACK, MEASURES

if TYPE_CHECKING:
    from fastlm.serve.feedback import FeedbackStore

MOST_ROWS = 100_000  # that are read of a period: the newest
FLOATS = (
    "at", "status", "queue_seconds", "first_token_seconds", "seconds", "prompt_tokens",
    "new_tokens", "refusal", "toxicity",
)  # fmt: skip
TEXTS = ("model", "finish_reason", "refusal_judge", "toxicity_judge")
C = MEASURES.c


@dataclass(frozen=True)
class Answers:
    """Measures as arrays of one length, oldest first. What is not known is NaN in a column of
    numbers, and "" in a column of texts. ``cut``: the period has more than `MOST_ROWS`.
    """

    columns: dict[str, np.ndarray]
    cut: bool = False

    def __len__(self) -> int:
        return len(self.columns["at"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def where(self, mask: np.ndarray) -> "Answers":
        return Answers({name: values[mask] for name, values in self.columns.items()}, self.cut)


@dataclass(frozen=True)
class FeedbackRow:
    """One thing that a rater said, as a number. ``at`` and ``model``: its answer's where that was
    measured, else its own time and "". ``kind``: thumb (1 or 0), comment, corrected, picked (1), or
    metrics.NAME. ``key``: the answer, or the conversation.
    """

    key: tuple[str, int]
    rater: str | None
    at: float
    model: str
    kind: str
    value: float


@dataclass(frozen=True)
class Period:
    """What the database has of a period of ``minutes``: of all models, or of one."""

    answers: Answers
    feedback: list[FeedbackRow]
    minutes: float

    def of_model(self, model: str | None) -> "Period":
        """Return what belongs to one model; None: to all."""
        if model is None:
            return self
        answers = self.answers.where(self.answers["model"] == model)
        return Period(answers, [r for r in self.feedback if r.model == model], self.minutes)


def read_period(store: "FeedbackStore", since: float, until: float, minutes: float) -> Period:
    """Read [since, until), of which ``minutes`` are over. InputError: the database cannot be used.

    Where it has more answers than are read, the period begins with the first one that is.
    """
    answers = read_answers(store, since, until)
    if answers.cut:
        minutes -= (float(answers["at"][0]) - since) / 60
    return Period(answers, read_opinions(store, since, until), minutes)


def read_answers(store: "FeedbackStore", since: float, until: float) -> Answers:
    """The measures of [since, until). InputError: the database cannot be used."""
    columns = [C[name] for name in (*FLOATS, *TEXTS)]
    query = sa.select(*columns).where(C.at >= since, C.at < until)
    rows = _all(store, query.order_by(C.at.desc()).limit(MOST_ROWS + 1))
    cut = len(rows) > MOST_ROWS
    turned = list(zip(*rows[:MOST_ROWS][::-1])) or [()] * len(columns)
    found: dict[str, np.ndarray] = {}
    for name, values in zip(FLOATS, turned):
        try:
            found[name] = np.array(values, np.float64)  # None becomes NaN
        except (TypeError, ValueError):
            raise InputError(
                f"{store.name}: {MEASURES.name}: {name}: expected numbers, got another value"
            ) from None
    for name, values in zip(TEXTS, turned[len(FLOATS) :]):
        found[name] = np.array([value or "" for value in values], object)
    return Answers(found, cut)


def read_features(
    store: "FeedbackStore", condition: Any, most: int, *, newest: bool = True
) -> tuple[list[bytes], int]:
    """The features of at most ``most`` prompts, and the id of the last of them."""
    order = C.id.desc() if newest else C.id
    query = sa.select(C.features, C.id).where(condition, C.features.is_not(None))
    rows = _all(store, query.order_by(order).limit(most))
    return [row[0] for row in rows], max((row[1] for row in rows), default=0)


def models(store: "FeedbackStore", most: int) -> list[str]:
    """The ``most`` models that answered last, in the order in which they came."""
    query = sa.select(C.model, sa.func.min(C.id), sa.func.max(C.at)).group_by(C.model)
    latest = sorted(_all(store, query), key=lambda row: -row[2])[:most]
    return [row[0] for row in sorted(latest, key=lambda row: row[1])]


def span(store: "FeedbackStore") -> tuple[float, float] | None:
    """When the first and the last measured answer ended."""
    ((first, last),) = _all(store, sa.select(sa.func.min(C.at), sa.func.max(C.at)))
    return None if first is None else (first, last)


def read_opinions(store: "FeedbackStore", since: float, until: float) -> list[FeedbackRow]:
    """The opinions about answers of [since, until), whenever they came, and those of that time
    about what was not measured. Of several of a rater about the same, the last of each kind counts.
    """
    F = FEEDBACK.c
    answer = sa.and_(C.response_id == F.response_id, C.choice == F.choice)
    its = (C.model, C.at)
    talks = (
        sa.select(C.conversation_id, sa.func.max(C.model).label("model"))
        .where(C.conversation_id.is_not(None))
        .group_by(C.conversation_id)
        .having(sa.func.min(C.model) == sa.func.max(C.model))
        .subquery()
    )
    talk = sa.and_(F.response_id.is_(None), talks.c.conversation_id == F.conversation_id)
    query = (
        sa.select(
            F.response_id, F.choice, F.conversation_id, F.rater, F.created_at, F.thumb,
            F.comment.is_not(None), F.corrected.is_not(None),
            sa.or_(F.preferred_over.is_not(None), F.ranking.is_not(None)),
            F.metrics, *its, talks.c.model,
        )
        .select_from(FEEDBACK)
        .outerjoin(MEASURES, answer)
        .outerjoin(talks, talk)
        .where(
            sa.or_(
                sa.and_(C.at >= since, C.at < until),
                sa.and_(C.at.is_(None), F.created_at >= _iso(since), F.created_at < _iso(until)),
            )
        )
        .order_by(F.id.desc())
        .limit(MOST_ROWS)
    )  # fmt: skip
    said = [one for row in _all(store, query)[::-1] for one in _said(row, store.name)]
    return list(latest(((one.rater, one.key, one.kind), one) for one in said).values())


def _said(row: Sequence[Any], name: str) -> Iterator[FeedbackRow]:
    id, choice, talk, rater, created, thumb, comment, corrected, picked, metrics, *its = row
    model, at, talk_model = its
    where = f"{name}: {FEEDBACK.name}: "
    key = (id, choice) if id is not None else (talk, -1)
    at = at if at is not None else read_time(created, f"{where}created_at")
    given = {"comment": comment, "corrected": corrected, "picked": picked}
    values = {kind: 1.0 for kind, is_given in given.items() if is_given}
    if thumb is not None:
        values["thumb"] = float(thumb == "up")
    for metric, value in read_metrics(metrics, where).items():
        values[f"metrics.{metric}"] = value
    for kind, value in values.items():
        yield FeedbackRow(key, rater, at, model or talk_model or "", kind, value)


def _iso(at: float) -> str:
    return datetime.fromtimestamp(max(0.0, at), UTC).isoformat(timespec="seconds")


def _all(store: "FeedbackStore", query: Any) -> Sequence[Any]:
    with store.read() as connection:
        return connection.execute(query).all()
