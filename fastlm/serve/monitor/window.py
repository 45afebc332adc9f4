"""Read a period from the database: measurements of answers, and feedback about them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa

from fastlm.errors import InputError
from fastlm.serve.feedback import latest
from fastlm.serve.feedback_rows import read_metrics, read_time
from fastlm.serve.tables import FEEDBACK, MEASUREMENTS

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore

MAX_ROWS = 100_000  # of a period: the newest ones
FLOATS = (
    "at", "status", "queue_seconds", "first_token_seconds", "seconds", "prompt_tokens",
    "new_tokens", "refusal", "toxicity",
)  # fmt: skip
TEXTS = ("model", "finish_reason", "refusal_judge", "toxicity_judge")
# A missing value is NaN in a column of numbers, and "" in a column of texts
ANSWER = np.dtype([*((name, np.float64) for name in FLOATS), *((name, object) for name in TEXTS)])
C = MEASUREMENTS.c


@dataclass(frozen=True)
class FeedbackRow:
    """One piece of feedback as a number. ``at`` and ``model``: the answer's if that was measured,
    else the feedback's own time and "". ``kind``: thumb (1 or 0), comment, corrected, picked (1),
    or metrics.NAME. ``key``: the answer, or the conversation.
    """

    key: tuple[str, int]
    rater: str | None
    at: float
    model: str
    kind: str
    value: float


@dataclass(frozen=True)
class Period:
    """The data of a period of ``minutes``, of all models or of one. ``answers``: of dtype `ANSWER`,
    oldest first. ``truncated``: the database has more than `MAX_ROWS`.
    """

    answers: np.ndarray
    feedback: list[FeedbackRow]
    minutes: float
    truncated: bool = False

    def for_model(self, model: str | None) -> "Period":
        """Return the data of one model; None: of all."""
        if model is None:
            return self
        answers = self.answers[self.answers["model"] == model]
        feedback = [row for row in self.feedback if row.model == model]
        return replace(self, answers=answers, feedback=feedback)


def read_period(store: "FeedbackStore", since: float, until: float, minutes: float) -> Period:
    """Read [since, until); ``minutes`` of it have passed. InputError: the database cannot be used.

    If the database has more answers than `MAX_ROWS`, the period begins with the first one that is
    read.
    """
    answers = read_measurements(store, since, until)
    if truncated := len(answers) > MAX_ROWS:
        answers = answers[1:]
        minutes -= (float(answers["at"][0]) - since) / 60
    return Period(answers, read_feedback_rows(store, since, until), minutes, truncated)


def read_measurements(store: "FeedbackStore", since: float, until: float) -> np.ndarray:
    """Return the measurements of [since, until), at most `MAX_ROWS` + 1."""
    texts = [sa.func.coalesce(C[name], "") for name in TEXTS]
    query = sa.select(*(C[name] for name in FLOATS), *texts).where(C.at >= since, C.at < until)
    rows = store.all(query.order_by(C.at.desc()).limit(MAX_ROWS + 1))
    try:
        return np.array([tuple(row) for row in rows[::-1]], ANSWER)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{store.name}: {MEASUREMENTS.name}: expected numbers, got: {error}"
        ) from None


def read_features(
    store: "FeedbackStore", condition: Any, limit: int, *, newest: bool = True
) -> tuple[list[bytes], int]:
    """Return the features of at most ``limit`` prompts, and the id of the last of them."""
    order = C.id.desc() if newest else C.id
    query = sa.select(C.features, C.id).where(condition, C.features.is_not(None))
    rows = store.all(query.order_by(order).limit(limit))
    return [row[0] for row in rows], max((row[1] for row in rows), default=0)


def latest_models(store: "FeedbackStore", limit: int) -> list[str]:
    """Return the ``limit`` models that answered last, in the order of their first answers."""
    query = sa.select(C.model, sa.func.min(C.id), sa.func.max(C.at)).group_by(C.model)
    rows = sorted(store.all(query), key=lambda row: -row[2])[:limit]
    return [row[0] for row in sorted(rows, key=lambda row: row[1])]


def measured_span(store: "FeedbackStore") -> tuple[float, float] | None:
    """Return when the first and the last measured answer ended."""
    ((first, last),) = store.all(sa.select(sa.func.min(C.at), sa.func.max(C.at)))
    return None if first is None else (first, last)


def read_feedback_rows(store: "FeedbackStore", since: float, until: float) -> list[FeedbackRow]:
    """Return the feedback about answers of [since, until), whenever it came, and the feedback of
    that time about answers that were not measured. If a rater gave feedback several times, the last
    of each kind counts.
    """
    F = FEEDBACK.c
    conversations = (  # with answers of one model only
        sa.select(C.conversation_id, sa.func.max(C.model).label("model"))
        .where(C.conversation_id.is_not(None))
        .group_by(C.conversation_id)
        .having(sa.func.min(C.model) == sa.func.max(C.model))
        .subquery()
    )
    in_period = sa.and_(F.created_at >= _iso(since), F.created_at < _iso(until))
    query = (
        sa.select(
            F.response_id, F.choice, F.conversation_id, F.rater, F.created_at, F.thumb, F.metrics,
            F.comment.is_not(None).label("comment"), F.corrected.is_not(None).label("corrected"),
            sa.or_(F.preferred_over.is_not(None), F.ranking.is_not(None)).label("picked"),
            C.at, sa.func.coalesce(C.model, conversations.c.model, "").label("model"),
        )
        .select_from(FEEDBACK)
        .outerjoin(MEASUREMENTS, sa.and_(C.response_id == F.response_id, C.choice == F.choice))
        .outerjoin(
            conversations,
            sa.and_(F.response_id.is_(None), conversations.c.conversation_id == F.conversation_id),
        )
        .where(sa.or_(sa.and_(C.at >= since, C.at < until), sa.and_(C.at.is_(None), in_period)))
        .order_by(F.id.desc())
        .limit(MAX_ROWS)
    )  # fmt: skip
    feedback = [f for row in store.all(query)[::-1] for f in _feedback_rows(row, store.name)]
    return list(latest(((f.rater, f.key, f.kind), f) for f in feedback).values())


def _feedback_rows(row: Any, name: str) -> Iterator[FeedbackRow]:
    prefix = f"{name}: {FEEDBACK.name}: "
    is_conversation = row.response_id is None
    key = (row.conversation_id, -1) if is_conversation else (row.response_id, row.choice)
    at = row.at if row.at is not None else read_time(row.created_at, f"{prefix}created_at")
    values = {kind: 1.0 for kind in ("comment", "corrected", "picked") if getattr(row, kind)}
    if row.thumb is not None:
        values["thumb"] = float(row.thumb == "up")
    for metric, value in read_metrics(row.metrics, prefix).items():
        values[f"metrics.{metric}"] = value
    for kind, value in values.items():
        yield FeedbackRow(key, row.rater, at, row.model, kind, value)


def _iso(at: float) -> str:
    return datetime.fromtimestamp(max(0.0, at), UTC).isoformat(timespec="seconds")
