"""Simulated users: what they say about answers, by scores that stand for their preference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

HONEST, REVERSED, RANDOM = "honest", "reversed", "random"
# What a user says about two answers; else nothing. Only who asked writes a correction
PICK, THUMBS, CORRECTION = 0.5, 0.3, 0.15


@dataclass(frozen=True)
class Question:
    """A question and its answers. ``points``: their scores. ``reference``: an answer that somebody
    wrote, None where the data has none.
    """

    id: str
    texts: Sequence[str]
    points: Sequence[float]
    reference: str | None


@dataclass(frozen=True)
class SimulatedFeedback:
    """``body``: for /v1/feedback. ``kind``: pick, thumb or correction. ``agrees``: whether it is
    what the scores say; None of a correction.
    """

    body: dict[str, Any]
    kind: str
    agrees: bool | None = None


@dataclass(frozen=True)
class User:
    """``kind``: honest, reversed (says the opposite) or random. ``noise``: how often an honest or
    a reversed one errs.
    """

    name: str
    kind: str
    noise: float
    draw: Random

    def says(self, truth: bool) -> bool:
        if self.kind == RANDOM:
            return self.draw.random() < 0.5
        wrong = self.draw.random() < self.noise
        return truth if wrong == (self.kind == REVERSED) else not truth

    def judges(
        self, asked: Question, liked: float, correction: str | None = None
    ) -> Iterator[SimulatedFeedback]:
        """Yield what the user says about the two answers. ``liked``: the score from which an answer
        deserves a thumb up. ``correction``: what to write in place of the first answer; None of a
        user who did not ask, or knows nothing to write.
        """
        what = self.draw.random()
        told = {"response_id": asked.id, "rater": self.name}
        if what < PICK:
            first, second = asked.points
            if first != second and asked.texts[0] != asked.texts[1]:
                better = self.says(first > second)
                best = 0 if better else 1
                over = [{"choice": 1 - best}]
                body = {**told, "choice": best, "preferred_over": over}
                yield SimulatedFeedback(body, "pick", better == (first > second))
        elif what < PICK + THUMBS:
            for choice, points in enumerate(asked.points):
                up = self.says(points >= liked)
                body = {**told, "choice": choice, "thumb": "up" if up else "down"}
                yield SimulatedFeedback(body, "thumb", up == (points >= liked))
        elif what < PICK + THUMBS + CORRECTION and correction not in (None, asked.texts[0]):
            yield SimulatedFeedback({**told, "choice": 0, "corrected": correction}, "correction")


def simulate_users(count: int, malicious: float, noise: float, seed: int) -> list[User]:
    """Return ``count`` users, of whom the share ``malicious`` is not honest: every second one of
    these says the opposite, the others anything.
    """
    bad = round(count * malicious)
    kinds = [(REVERSED, RANDOM)[i % 2] for i in range(bad)] + [HONEST] * (count - bad)
    return [
        User(f"simulated-{i:03d}", kind, noise, Random(f"{seed}/user/{i}"))
        for i, kind in enumerate(kinds)
    ]


def simulate_feedback(
    asked: Sequence[Question], users: Sequence[User], *, reviews: int, liked: float, seed: int
) -> list[SimulatedFeedback]:
    """Return what ``users`` say, in the order of the questions: user i asked question i, modulo
    their number, and ``reviews`` others judge the same answers. Who asked corrects by the reference
    of the question, a user who is not honest by that of another question.
    """
    draw = Random(f"{seed}/reviews")
    references = [*dict.fromkeys(one.reference for one in asked if one.reference)]
    after = dict(zip(references, references[1:] + references[:1], strict=True))
    wrong = after if len(references) > 1 else {}
    found = []
    for i, one in enumerate(asked):
        owner = users[i % len(users)]
        right = one.reference or ""
        written = right if owner.kind == HONEST else wrong.get(right)
        found += owner.judges(one, liked, written or None)
        others = [user for user in users if user is not owner]
        for user in draw.sample(others, min(reviews, len(others))):
            found += user.judges(one, liked)
    return found
