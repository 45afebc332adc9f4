"""The tables of a canary in the feedback database: the model of each response, and the outcome of
each conversation. They contain no text of a prompt or an answer.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from fastlm.serve.canary.decision import Variant
from fastlm.serve.tables import CANARY_ANSWERS, CANARY_OUTCOMES

if TYPE_CHECKING:
    from fastlm.serve.feedback import Feedback
    from fastlm.serve.feedback_store import FeedbackStore
    from fastlm.serve.ratings import Rating

A = CANARY_ANSWERS.c


class CanaryStore:
    """Reads and writes the canary's tables in ``feedback``. Any thread may call it; a write is on
    disk when the method returns. ``rating``: the number that the metric may name. Every method
    raises InputError if the database cannot be used."""

    def __init__(self, feedback: "FeedbackStore", rating: "Rating | None" = None):
        self.feedback, self.rating = feedback, rating

    def add_answer(self, **values: Any) -> bool:
        """Store the model of a response; ``values`` are the columns of `CANARY_ANSWERS`. Return
        whether it is the conversation's first response with a time by an assigned model."""
        timed = sa.select(A.response_id).where(
            A.experiment == values["experiment"], A.unit == values["unit"], A.assigned,
            A.seconds_per_token.is_not(None),
        )  # fmt: skip
        with self.feedback.write() as connection:
            has_earlier = connection.execute(timed.limit(1)).first() is not None
            is_new = self.feedback.insert_new(connection, CANARY_ANSWERS, values)
        is_timed = values["assigned"] and values["seconds_per_token"] is not None
        return is_new and not has_earlier and is_timed

    def add_outcome(
        self, experiment: str, unit: str, arm: str, success: bool, response_id: str | None
    ) -> bool:
        """Store the first outcome of a conversation. Return False if there is one already."""
        row = {
            "experiment": experiment, "unit": unit, "arm": arm, "success": success,
            "response_id": response_id,
        }  # fmt: skip
        with self.feedback.write() as connection:
            return self.feedback.insert_new(connection, CANARY_OUTCOMES, row)

    def add_feedback(self, feedback: "Feedback", metric: str) -> tuple[str, str, bool] | None:
        """Store the outcome that feedback has by a metric; return (experiment, arm, success).

        None: the conversation has an outcome already, the response belongs to no experiment, or its
        client chose the model.
        """
        if metric == "pick":
            outcome = self._pick(feedback)
        elif (thumb := self._thumb(feedback, metric)) is None:
            return None
        else:
            row = self._find(feedback.response_id, feedback.conversation_id)
            outcome = None
            if row is not None and row.assigned:
                outcome = row.experiment, row.unit, row.arm, thumb == "up"
        if outcome is None or not self.add_outcome(*outcome, feedback.response_id):
            return None
        experiment, _, arm, success = outcome
        return experiment, arm, success

    def _pick(self, feedback: "Feedback") -> tuple[str, str, str, bool] | None:
        """Return (experiment, unit, arm, success) of a pick between answers of both models.

        A hash chooses the arm for which the pick counts. So the arms are independent, and a canary
        that is as good as the old model succeeds in half of its picks.
        """
        better = self._find(feedback.response_id)
        for id, _ in feedback.preferred_over:
            worse = self._find(id)
            if better is None or worse is None or better.experiment != worse.experiment:
                continue
            if better.arm == worse.arm:
                continue
            pair = "\0".join(sorted((better.unit, worse.unit)))
            unit = hashlib.sha256(f"{better.experiment}\0{pair}".encode()).hexdigest()
            arm = ("old", "new")[int(unit[0], 16) % 2]
            return better.experiment, unit, arm, better.arm == arm
        return None

    def _thumb(self, feedback: "Feedback", metric: str) -> str | None:
        if metric == "thumb":
            return feedback.thumb
        value = dict(feedback.metrics).get(metric)
        if value is None or self.rating is None or metric != self.rating.name:
            return None
        return self.rating.thumb(value)

    def _find(self, response_id: str | None, conversation_id: str | None = None) -> Any:
        """Return the row of a response, or the last one of a conversation."""
        condition = A.response_id == response_id
        if response_id is None:
            condition = A.conversation_id == (conversation_id or "")
        return self.feedback.first(CANARY_ANSWERS.select().where(condition).order_by(A.at.desc()))

    def counts(self, experiment: str) -> dict[str, Variant]:
        """Return the counts of an experiment by arm."""

        def totals(table: Any, column: Any, *conditions: Any) -> dict[str, tuple[int, int]]:
            c, total = table.c, sa.func.sum(sa.case((column, 1), else_=0))
            query = sa.select(c.arm, sa.func.count(), total).where(
                c.experiment == experiment, *conditions
            )
            rows = self.feedback.all(query.group_by(c.arm))
            return {arm: (int(count), int(total)) for arm, count, total in rows}

        answers = totals(CANARY_ANSWERS, A.error, A.assigned)
        outcomes = totals(CANARY_OUTCOMES, CANARY_OUTCOMES.c.success)
        return {
            arm: Variant(*outcomes.get(arm, (0, 0)), *answers.get(arm, (0, 0)))
            for arm in ("old", "new")
        }

    def first_paces(self, experiment: str) -> list[tuple[str, float]]:
        """Return arm and seconds per token of each conversation's first response with a time, in
        chronological order."""
        number = sa.func.row_number().over(partition_by=A.unit, order_by=A.at).label("number")
        timed = sa.select(A.arm, A.seconds_per_token, A.at, number).where(
            A.experiment == experiment, A.assigned, A.seconds_per_token.is_not(None)
        )
        rows = timed.subquery().c
        query = sa.select(rows.arm, rows.seconds_per_token).where(rows.number == 1)
        query = query.order_by(rows.at)
        return [(row.arm, row.seconds_per_token) for row in self.feedback.all(query)]

    def model_name(self, response_id: str) -> str | None:
        """Return the name of the model that gave a response; None: unknown."""
        row = self._find(response_id)
        return None if row is None else row.model
