"""The part of the feedback database that a canary needs: which model gave which answer, and what
became of each conversation. No text of a prompt or an answer.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from fastlm.serve.canary.canary import Variant
from fastlm.serve.canary_tables import ANSWERS, OUTCOMES, metadata

if TYPE_CHECKING:
    from fastlm.serve.feedback import FeedbackStore
    from fastlm.serve.ratings import Rating
    from fastlm.serve.responses import Feedback


class CanaryStore:
    """Tables beside those of ``feedback``, made if they are missing. Any thread may call it; a
    write is on disk when the method returns. ``rating``: the number that a metric may name.
    InputError, from every method: the database cannot be used."""

    def __init__(self, feedback: "FeedbackStore", rating: "Rating | None" = None):
        self.engine, self.name = feedback.engine, feedback.name
        self.rating = rating
        self.feedback = feedback
        feedback.create(metadata)

    def _run(self, work: Any) -> Any:
        with self.feedback.write() as connection:
            return work(connection)

    def answer(self, **values: Any) -> bool:
        """Store which model gave an answer: the columns of `ANSWERS`. Return whether it is the
        first answer with a time of its conversation, by the model that the experiment chose."""
        a = ANSWERS.c
        timed = sa.select(a.response_id).where(
            a.experiment == values["experiment"], a.unit == values["unit"], a.assigned,
            a.pace.is_not(None),
        )  # fmt: skip

        def work(connection: sa.Connection) -> bool:
            known = connection.execute(timed.limit(1)).first() is not None
            new = self.feedback.insert_new(connection, ANSWERS, values)
            return new and not known and values["assigned"] and values["pace"] is not None

        return self._run(work)

    def outcome(
        self, experiment: str, unit: str, arm: str, success: bool, response_id: str | None
    ) -> bool:
        """Store the first outcome of a conversation. Whether it was the first."""
        values = {
            "experiment": experiment, "unit": unit, "arm": arm, "success": success,
            "response_id": response_id,
        }  # fmt: skip
        return self._run(lambda c: self.feedback.insert_new(c, OUTCOMES, values))

    def count(self, opinion: "Feedback", metric: str) -> tuple[str, str, bool] | None:
        """Store what an opinion says of an answer of an experiment; return (experiment, arm,
        success), None where it says nothing new."""
        found = self._said(opinion, metric)
        if found is None:
            return None
        experiment, unit, arm, success = found
        new = self.outcome(experiment, unit, arm, success, opinion.response_id)
        return (experiment, arm, success) if new else None

    def _said(self, opinion: "Feedback", metric: str) -> tuple[str, str, str, bool] | None:
        """What an opinion says by this metric: (experiment, unit, arm, success). None: nothing, or
        the answer is not one of an experiment, or its client chose the model.

        A pick counts where the two answers are of both models, for one of the two, by a hash: then
        the arms are independent, and a canary as good as the old model wins half of each.
        """
        if (thumb := self._thumb(opinion, metric)) is not None:
            row = self._found(opinion.response_id, opinion.conversation_id)
            if row is not None and row.assigned:
                return row.experiment, row.unit, row.arm, thumb == "up"
        if metric == "pick" and opinion.preferred_over:
            better = self._found(opinion.response_id)
            for id, _ in opinion.preferred_over:
                worse = self._found(id)
                if better is None or worse is None or better.experiment != worse.experiment:
                    continue
                if better.arm != worse.arm:
                    pair = "\0".join(sorted((better.unit, worse.unit)))
                    unit = hashlib.sha256(f"{better.experiment}\0{pair}".encode()).hexdigest()
                    counted = ("old", "new")[int(unit[0], 16) % 2]
                    return better.experiment, unit, counted, better.arm == counted
        return None

    def _thumb(self, opinion: "Feedback", metric: str) -> str | None:
        if metric == "thumb":
            return opinion.thumb
        values = dict(opinion.metrics)
        if self.rating is None or metric != self.rating.name or metric not in values:
            return None
        return self.rating.thumb(values[metric])

    def _found(self, response_id: str | None, conversation_id: str | None = None) -> Any:
        """An answer by its id, else the last one of a conversation."""
        query = ANSWERS.select().order_by(ANSWERS.c.at.desc()).limit(1)
        if response_id is not None:
            query = query.where(ANSWERS.c.response_id == response_id)
        elif conversation_id is not None:
            query = query.where(ANSWERS.c.conversation_id == conversation_id)
        else:
            return None
        return self._run(lambda c: c.execute(query).first())

    def counts(self, experiment: str) -> dict[str, Variant]:
        """What was counted so far, by arm."""

        def number(condition: Any) -> Any:
            return sa.func.coalesce(sa.func.sum(sa.case((condition, 1), else_=0)), 0)

        found = {}
        for arm in ("old", "new"):
            a, o = ANSWERS.c, OUTCOMES.c
            answers = sa.select(sa.func.count(), number(a.error)).where(
                a.experiment == experiment, a.arm == arm, a.assigned
            )
            outcomes = sa.select(sa.func.count(), number(o.success)).where(
                o.experiment == experiment, o.arm == arm
            )
            given, errors = self._run(lambda c, q=answers: c.execute(q).one())
            count, successes = self._run(lambda c, q=outcomes: c.execute(q).one())
            found[arm] = Variant(count, successes, given, errors)
        return found

    def first_paces(self, experiment: str) -> list[tuple[str, float]]:
        """Return arm and seconds per token of each conversation's first answer with a time, in
        their order."""
        a = ANSWERS.c
        number = sa.func.row_number().over(partition_by=a.unit, order_by=a.at).label("number")
        timed = sa.select(a.arm, a.pace, a.at, number).where(
            a.experiment == experiment, a.assigned, a.pace.is_not(None)
        )
        rows = timed.subquery()
        query = sa.select(rows.c.arm, rows.c.pace).where(rows.c.number == 1).order_by(rows.c.at)
        return [(arm, pace) for arm, pace in self._run(lambda c: c.execute(query).all())]

    def model_of(self, response_id: str) -> str | None:
        """The name of the model that gave an answer, None if it is not known."""
        row = self._found(response_id)
        return None if row is None else row.model
