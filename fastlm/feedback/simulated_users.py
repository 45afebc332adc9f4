"""Simulate users who give feedback about answers, by scores that stand for their preference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

HONEST, REVERSED, RANDOM = "honest", "reversed", "random"
# Probabilities of each kind of feedback about two answers; else there is none. Only the user who
# asked writes a correction
PICK, THUMBS, CORRECTION = 0.5, 0.3, 0.15


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question and two answers. ``id``: of the response. ``scores``: of the answers.
    ``reference``: a human answer, None if the data has none.
    """

    id: str
    texts: Sequence[str]
    scores: Sequence[float]
    reference: str | None


@dataclass(frozen=True)
class SimulatedFeedback:
    """Feedback of a simulated user. ``body``: for /v1/feedback. ``kind``: pick, thumb or
    correction. ``agrees``: whether it agrees with the scores; None for a correction.
    """

    body: dict[str, Any]
    kind: str
    agrees: bool | None = None


@dataclass(frozen=True)
class SimulatedUser:
    """A user. ``kind``: honest, reversed (says the opposite) or random. ``noise``: the error rate
    of an honest or a reversed user.
    """

    name: str
    kind: str
    noise: float
    draw: Random

    def answer(self, truth: bool) -> bool:
        """Return what the user says instead of the truth."""
        if self.kind == RANDOM:
            return self.draw.random() < 0.5
        wrong = self.draw.random() < self.noise
        return truth if wrong == (self.kind == REVERSED) else not truth

    def give_feedback(
        self, question: AnsweredQuestion, thumb_threshold: float, correction: str | None = None
    ) -> Iterator[SimulatedFeedback]:
        """Yield the user's feedback about the two answers. ``thumb_threshold``: the lowest score of
        an answer that deserves a thumb up. ``correction``: the text that replaces the first answer,
        or None for a user who did not ask or has no correction.
        """
        number = self.draw.random()
        ids = {"response_id": question.id, "rater": self.name}
        if number < PICK:
            first, second = question.scores
            if first != second and question.texts[0] != question.texts[1]:
                better = self.answer(first > second)
                best = 0 if better else 1
                worse = [{"choice": 1 - best}]
                body = {**ids, "choice": best, "preferred_over": worse}
                yield SimulatedFeedback(body, "pick", better == (first > second))
        elif number < PICK + THUMBS:
            for choice, score in enumerate(question.scores):
                up = self.answer(score >= thumb_threshold)
                body = {**ids, "choice": choice, "thumb": "up" if up else "down"}
                yield SimulatedFeedback(body, "thumb", up == (score >= thumb_threshold))
        elif number < PICK + THUMBS + CORRECTION and correction not in (None, question.texts[0]):
            yield SimulatedFeedback({**ids, "choice": 0, "corrected": correction}, "correction")


def simulate_users(
    count: int, malicious_share: float, noise: float, seed: int
) -> list[SimulatedUser]:
    """Return ``count`` users, of whom the share ``malicious_share`` is not honest: every second one
    of these is reversed, the others are random.
    """
    malicious = round(count * malicious_share)
    kinds = [(REVERSED, RANDOM)[i % 2] for i in range(malicious)] + [HONEST] * (count - malicious)
    return [
        SimulatedUser(f"simulated-{i:03d}", kind, noise, Random(f"{seed}/user/{i}"))
        for i, kind in enumerate(kinds)
    ]


def simulate_feedback(
    questions: Sequence[AnsweredQuestion],
    users: Sequence[SimulatedUser],
    *,
    reviewers: int,
    thumb_threshold: float,
    seed: int,
) -> list[SimulatedFeedback]:
    """Return the feedback of ``users``, in the order of the questions: user i asked question i,
    modulo their number, and ``reviewers`` others judge the same answers. The user who asked writes
    the reference of the question as a correction; a user who is not honest writes that of another
    question.
    """
    draw = Random(f"{seed}/reviews")
    references = [*dict.fromkeys(q.reference for q in questions if q.reference)]
    next_reference = dict(zip(references, references[1:] + references[:1], strict=True))
    wrong = next_reference if len(references) > 1 else {}
    feedback = []
    for i, question in enumerate(questions):
        asker = users[i % len(users)]
        right = question.reference or ""
        correction = right if asker.kind == HONEST else wrong.get(right)
        feedback += asker.give_feedback(question, thumb_threshold, correction or None)
        others = [user for user in users if user is not asker]
        for user in draw.sample(others, min(reviewers, len(others))):
            feedback += user.give_feedback(question, thumb_threshold)
    return feedback
