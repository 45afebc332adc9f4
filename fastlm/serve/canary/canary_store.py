"""The part of the feedback database that a canary needs: which model gave which answer, and what
became of each conversation. No text of a prompt or an answer.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from fastlm.serve.canary.decision import Variant
from fastlm.serve.tables import CANARY_ANSWERS, CANARY_OUTCOMES

if TYPE_CHECKING:
    from fastlm.serve.feedback_store import FeedbackStore
    from fastlm.serve.ratings import Rating
    from fastlm.serve.responses import Feedback

A = CANARY_ANSWERS.c


class CanaryStore:
    """The canary's tables of ``feedback``. Any thread may call it; a write is on disk when the
    method returns. ``rating``: the number that a metric may name. InputError, from every method:
    the database cannot be used."""

    def __init__(self, feedback: "FeedbackStore", rating: "Rating | None" = None):
        self.feedback, self.rating = feedback, rating

    def answer(self, **values: Any) -> bool:
        """Store which model gave an answer: the columns of `CANARY_ANSWERS`. Return whether it is
        the first answer with a time of its conversation, by the model that the experiment chose."""
        timed = sa.select(A.response_id).where(
            A.experiment == values["experiment"], A.unit == values["unit"], A.assigned,
            A.pace.is_not(None),
        )  # fmt: skip
        with self.feedback.write() as connection:
            known = connection.execute(timed.limit(1)).first() is not None
            new = self.feedback.insert_new(connection, CANARY_ANSWERS, values)
        return new and not known and values["assigned"] and values["pace"] is not None

    def outcome(
        self, experiment: str, unit: str, arm: str, success: bool, response_id: str | None
    ) -> bool:
        """Store the first outcome of a conversation. Whether it was the first."""
        row = {
            "experiment": experiment, "unit": unit, "arm": arm, "success": success,
            "response_id": response_id,
        }  # fmt: skip
        with self.feedback.write() as connection:
            return self.feedback.insert_new(connection, CANARY_OUTCOMES, row)

    def count(self, feedback: "Feedback", metric: str) -> tuple[str, str, bool] | None:
        """Store what the feedback says of an answer of an experiment by this metric; return
        (experiment, arm, success). None: nothing new, or the answer is not one of an experiment, or
        its client chose the model.
        """
        if metric == "pick":
            found = self._pick(feedback)
        elif (thumb := self._thumb(feedback, metric)) is None:
            return None
        else:
            row = self._found(feedback.response_id, feedback.conversation_id)
            found = None
            if row is not None and row.assigned:
                found = row.experiment, row.unit, row.arm, thumb == "up"
        if found is None or not self.outcome(*found, feedback.response_id):
            return None
        experiment, _, arm, success = found
        return experiment, arm, success

    def _pick(self, feedback: "Feedback") -> tuple[str, str, str, bool] | None:
        """(experiment, unit, arm, success). A pick counts where the two answers are of both models,
        for one of the two, by a hash: then the arms are independent, and a canary as good as the
        old model wins half of each.
        """
        better = self._found(feedback.response_id)
        for id, _ in feedback.preferred_over:
            worse = self._found(id)
            if better is None or worse is None or better.experiment != worse.experiment:
                continue
            if better.arm == worse.arm:
                continue
            pair = "\0".join(sorted((better.unit, worse.unit)))
            unit = hashlib.sha256(f"{better.experiment}\0{pair}".encode()).hexdigest()
            counted = ("old", "new")[int(unit[0], 16) % 2]
            return better.experiment, unit, counted, better.arm == counted
        return None

    def _thumb(self, feedback: "Feedback", metric: str) -> str | None:
        if metric == "thumb":
            return feedback.thumb
        value = dict(feedback.metrics).get(metric)
        if value is None or self.rating is None or metric != self.rating.name:
            return None
        return self.rating.thumb(value)

    def _found(self, response_id: str | None, conversation_id: str | None = None) -> Any:
        """An answer by its id, else the last one of a conversation."""
        its = A.response_id == response_id
        if response_id is None:
            its = A.conversation_id == (conversation_id or "")
        return self.feedback.first(CANARY_ANSWERS.select().where(its).order_by(A.at.desc()))

    def counts(self, experiment: str) -> dict[str, Variant]:
        """What was counted so far, by arm."""

        def totals(table: Any, column: Any, *which: Any) -> dict[str, tuple[int, int]]:
            its, total = table.c, sa.func.sum(sa.case((column, 1), else_=0))
            query = sa.select(its.arm, sa.func.count(), total).where(
                its.experiment == experiment, *which
            )
            rows = self.feedback.all(query.group_by(its.arm))
            return {arm: (int(count), int(hits)) for arm, count, hits in rows}

        answers = totals(CANARY_ANSWERS, A.error, A.assigned)
        outcomes = totals(CANARY_OUTCOMES, CANARY_OUTCOMES.c.success)
        return {
            arm: Variant(*outcomes.get(arm, (0, 0)), *answers.get(arm, (0, 0)))
            for arm in ("old", "new")
        }

    def first_paces(self, experiment: str) -> list[tuple[str, float]]:
        """Return arm and seconds per token of each conversation's first answer with a time, in
        their order."""
        number = sa.func.row_number().over(partition_by=A.unit, order_by=A.at).label("number")
        timed = sa.select(A.arm, A.pace, A.at, number).where(
            A.experiment == experiment, A.assigned, A.pace.is_not(None)
        )
        rows = timed.subquery().c
        query = sa.select(rows.arm, rows.pace).where(rows.number == 1).order_by(rows.at)
        return [(row.arm, row.pace) for row in self.feedback.all(query)]

    def model_of(self, response_id: str) -> str | None:
        """The name of the model that gave an answer, None if it is not known."""
        row = self._found(response_id)
        return None if row is None else row.model
