"""Answers to prompts that people rank, in a feedback database (`fastlm.serve.feedback_store`).

An item is a stored answer with several choices: of rows that somebody imported, of a model that
sampled them, or of `fastlm serve` where a user let us keep more than one. A rater's order of them
is feedback with a `Ranking`: the last one counts, ``fastlm feedback build`` reads it as picks.

`fastlm.feedback.rank_terminal` is the way to rank in a terminal.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fastlm.data.conversations import (
    Conversation,
    Message,
    RowCounts,
    message_contents,
    read_examples,
)
from fastlm.data.forget_log import response_key
from fastlm.data.preferences import Comparison, LabelledAnswer, UnrankedAnswers, parse_answers
from fastlm.errors import InputError, check_unicode, show
from fastlm.files import atomic_file
from fastlm.serve.feedback import Feedback, Ranking, StoredResponse
from fastlm.serve.feedback_rows import (
    SKIPPED,
    as_json,
    read_feedback,
    read_response,
    row_of,
    scrubbed,
)
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.serve.tables import ANSWERS, FEEDBACK, WITHDRAWN
from fastlm.sources.rows import ignore_message
from fastlm.stats.agreement import Agreement, agreement_of

FILE_RATER = "file"  # the rater of rows that were ranked already and name nobody
FORMS: dict[str, Callable[[Comparison], Sequence[Comparison | LabelledAnswer | Conversation]]] = {
    "pairs": lambda one: [replace(pair, corrected=False) for pair in one.pairs()],
    "ranked": lambda one: [] if one.corrected else [one],
    "labels": lambda one: [] if one.corrected else one.labels(),
    "corrected": lambda one: [one] if one.corrected else [],
    "demonstrations": lambda one: [one.demonstration()] if one.corrected else [],
}
SEVERAL = ANSWERS.c.num_choices > 1


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its answers, in the order in which the rater sees them. ``shown``: which choice
    of the stored answer each is. An answer has the messages from the assistant's first to its last.
    """

    id: int
    response_id: str
    prompt: list[Message]
    answers: tuple[list[Message], ...]
    shown: tuple[int, ...]
    tools: list[Any] | None


@dataclass
class Added:
    """How many items and rankings an import added, how many of its rows the store had already, and
    how many were left out since only personal data tells their answers apart.
    """

    items: int = 0
    rankings: int = 0
    corrections: int = 0
    known: int = 0
    alike: int = 0


@dataclass
class RaterCounts:
    """How many items a rater ranked and skipped, and how many answers he or she corrected."""

    ranked: int = 0
    skipped: int = 0
    corrected: int = 0


def read_ranking_examples(
    sources: Sequence[str],
    *,
    cache: Path,
    skip_bad: bool = False,
    rows: RowCounts | None = None,
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[Comparison | UnrankedAnswers]:
    """Yield what `RankingStore.add_items` takes from files or packages, as `read_preferences` does.
    Bad rows are also: one with a label, which has one answer; a correction that is not the answer
    with another text in its last message; a rater by an address or a number.
    """

    def parse(row: Any, location: str) -> Comparison | UnrankedAnswers:
        example = parse_answers(row, location)
        if isinstance(example, LabelledAnswer):
            raise InputError("expected two or more answers to rank, got one with a label")
        if isinstance(example, Comparison):
            check_rater(example.rater or FILE_RATER)
            if example.corrected:
                _corrected_text(example)
        return example

    return read_examples(sources, parse, cache=cache, skip_bad=skip_bad, rows=rows, on_skip=on_skip)


def _corrected_text(correction: Comparison) -> str:
    (pair,) = correction.pairs()
    fixed, answer = pair.answers
    text = fixed[-1]["content"]
    if message_contents(fixed) != message_contents(
        [*answer[:-1], {"role": "assistant", "content": text}]
    ):
        raise InputError("corrected: expected the answer with another last text, got more changes")
    return text


class RankingStore(FeedbackStore):
    """A feedback database whose answers people rank. ``seed`` draws the orders in which they are
    shown. InputError, from every method: also what `FeedbackStore` says.
    """

    def __init__(self, where: str | Path, *, create: bool = True, seed: int = 0):
        self.seed = seed
        super().__init__(where, create=create)

    # ---- items

    def add_items(self, examples: Iterable[Comparison | UnrankedAnswers], model: str = "") -> Added:
        """Add prompts with answers (of ``model``), all or none. Ranks become feedback of the
        example's rater ("file" if it names none). What the store has already is counted and left
        unchanged; what was forgotten is not stored again.
        """
        added = Added()
        with self.write() as connection:
            gone = frozenset(connection.execute(sa.select(WITHDRAWN.c.key)).scalars())
            for example in examples:
                self._add(connection, example, model, gone, added)
        return added

    def _add(
        self, connection: sa.Connection, example: Comparison | UnrankedAnswers, model: str,
        gone: frozenset[str], added: Added,
    ) -> None:  # fmt: skip
        ranked = example if isinstance(example, Comparison) else None
        answers, corrected = list(example.answers), False
        if ranked is not None and ranked.corrected:  # the better one is no answer of a model
            answers, corrected = [ranked.pairs()[0].answers[1]], True
        row = row_of(StoredResponse("", model, example.prompt, answers, example.tools))
        choices = json.loads(row["choices"])
        texts = [as_json(message_contents(choice)) for choice in choices]
        order = sorted(range(len(texts)), key=texts.__getitem__)  # an item has its in any order
        ranks = range(len(texts)) if ranked is None or corrected else ranked.ranks
        if len(set(texts)) < len(set(zip(texts, ranks))):
            added.alike += 1
            return
        content = [message_contents(json.loads(row["prompt"])), sorted(texts), row["tools"]]
        id = f"rank-{_digest(content)[:32]}"
        row |= {"response_id": id, "choices": as_json([choices[i] for i in order])}
        new = response_key(id) not in gone
        is_item = new and self.insert_new(connection, ANSWERS, row)
        if new and ranked is not None:
            new = self._add_feedback(connection, id, ranked, order)
            added.corrections += new and corrected
            added.rankings += new and not corrected
        else:
            new = is_item
        added.items += is_item and not corrected  # one choice: nothing to rank
        added.known += not (new or is_item)

    def _add_feedback(
        self, connection: sa.Connection, id: str, ranked: Comparison, order: list[int]
    ) -> bool:
        """Store what a row says. False: its rater has said something of this kind."""
        rater = ranked.rater or FILE_RATER
        if ranked.corrected:
            kind, feedback = "corrected", Feedback(id, corrected=_corrected_text(ranked))
        else:
            scores = None if ranked.scores is None else tuple(ranked.scores[i] for i in order)
            ranks = tuple(ranked.ranks[i] for i in order)
            ranking = Ranking(ranks, scores=scores, margin=ranked.margin)
            kind, feedback = "ranking", Feedback(id, ranking=ranking)
        before = sa.select(FEEDBACK.c.id).where(
            FEEDBACK.c.response_id == id, FEEDBACK.c.rater == rater, FEEDBACK.c[kind].is_not(None)
        )
        if connection.execute(before.limit(1)).first() is not None:
            return False
        connection.execute(FEEDBACK.insert().values(row_of(replace(feedback, rater=rater))))
        return True

    def has_prompt(self, prompt: list[Message], tools: list[Any] | None) -> bool:
        """Whether the store has several answers to this prompt."""
        own = ANSWERS.c.tools
        same = own.is_(None) if tools is None else own == as_json(scrubbed(tools))
        its = (SEVERAL, ANSWERS.c.prompt == as_json(scrubbed(prompt)), same)
        return self.first(sa.select(ANSWERS.c.id).where(*its)) is not None

    def item(self, id: int, rater: str) -> Item:
        """The item with this id. The rater sees its answers in an order drawn from the store's
        seed, the rater and the item.
        """
        row = self.first(ANSWERS.select().where(SEVERAL, ANSWERS.c.id == id))
        if row is None:
            raise InputError(f"item: expected one of the store, got {id}")
        answer = read_response(row, self.name)
        shown = list(range(len(answer.choices)))
        random.Random(_digest([self.seed, rater, answer.response_id])).shuffle(shown)
        return Item(
            id, answer.response_id, answer.prompt, tuple(answer.choices[i] for i in shown),
            tuple(shown), answer.tools,
        )  # fmt: skip

    def next_item(self, rater: str, *, after: int = 0, skipped: bool = False) -> Item | None:
        """The first item, of those with an id above ``after``, that the rater has not ranked or
        skipped; or, with ``skipped``, that the rater skipped. None: there is none.
        """
        its = FEEDBACK.c
        own = its.response_id == ANSWERS.c.response_id, its.rater == rater, its.ranking.is_not(None)
        # a look-up of each item: the last feedback of all items at once would be read for each call
        last = sa.select(its.ranking).where(*own).order_by(its.id.desc()).limit(1).scalar_subquery()
        state = last == SKIPPED if skipped else last.is_(None)
        query = sa.select(ANSWERS.c.id).where(SEVERAL, ANSWERS.c.id > after, state)
        row = self.first(query.order_by(ANSWERS.c.id))
        return None if row is None else self.item(row.id, rater)

    def progress(self, rater: str) -> tuple[RaterCounts, int]:
        """(what the rater has done, how many items there are to rank)."""
        check_rater(rater)
        (total,) = self.first(sa.select(sa.func.count(ANSWERS.c.id)).where(SEVERAL))
        return self.raters(rater).get(rater, RaterCounts()), total

    # ---- feedback

    def rank(self, rater: str, item: Item, ranks: Sequence[int]) -> None:
        """Store the rater's ranks of an item. ``ranks``: in the order of ``item.answers``, 0 is the
        best, equal for ties.
        """
        if len(ranks) != len(item.answers):
            raise InputError(
                f"ranks: expected one for each of {len(item.answers)} answers, got {len(ranks)}"
            )
        for rank in ranks:
            if type(rank) is not int or not 0 <= rank < len(ranks):
                raise InputError(
                    f"ranks: expected whole numbers from 0 to {len(ranks) - 1}, got "
                    f"{show(rank):.60}"
                )
        places = sorted(set(ranks))
        of_choice = dict(zip(item.shown, map(places.index, ranks)))
        by_choice = tuple(of_choice[choice] for choice in range(len(ranks)))
        self._say(rater, item, ranking=Ranking(by_choice, item.shown))

    def skip(self, rater: str, item: Item) -> None:
        """Store that the rater skipped the item."""
        self._say(rater, item, ranking=Ranking())

    def correct(self, rater: str, item: Item, number: int, text: str) -> None:
        """Store the text that the rater would have the last message of an answer say. ``number``:
        in ``item.answers``.
        """
        check_unicode(text, "correction")
        if not text.strip():
            raise InputError("correction: expected text, got an empty one")
        if text.strip() == item.answers[number][-1]["content"].strip():
            raise InputError("correction: expected another text than the answer, got the same")
        self._say(rater, item, choice=item.shown[number], corrected=text)

    def _say(self, rater: str, item: Item, **what: Any) -> None:
        check_rater(rater)
        if self.add(Feedback(item.response_id, rater=rater, **what)) is None:
            raise InputError(f"item: expected one of the store, got {item.id}, which was forgotten")

    # ---- results

    def raters(self, rater: str | None = None) -> dict[str, RaterCounts]:
        """What each rater has done, by name; or only this one."""
        found: dict[str, RaterCounts] = {}
        for kind in ("ranking", "corrected"):
            for row in self.all(_last(kind, rater)):
                counts = found.setdefault(row.rater or "", RaterCounts())
                counts.corrected += kind == "corrected"
                counts.skipped += kind == "ranking" and row.ranking == SKIPPED
                counts.ranked += kind == "ranking" and row.ranking != SKIPPED
        return dict(sorted(found.items()))

    def agreement(self) -> Agreement:
        """How far the raters agree, on all items that two or more ranked."""
        rankings: dict[str, dict[str, Sequence[int]]] = {}
        for answer, feedback in self._last_feedback("ranking", None):
            if feedback.ranking is not None and feedback.ranking.ranks:
                its = rankings.setdefault(answer.response_id, {})
                its[feedback.rater or ""] = feedback.ranking.ranks
        return agreement_of(rankings.values())

    def figures(self) -> dict[str, Any]:
        """`agreement` and `raters` as JSON; alpha is None where it is undefined."""
        have, raters = asdict(self.agreement()), self.raters()
        alpha = None if math.isnan(have["alpha"]) else have["alpha"]
        return {**have, "alpha": alpha, "raters": {name: asdict(n) for name, n in raters.items()}}

    def comparisons(
        self, rater: str | None = None, *, corrected: bool = False
    ) -> Iterator[Comparison]:
        """The rankings (of one rater, if named), item by item; or with ``corrected`` the corrected
        answers, each better than the one that it corrects. Rankings in which all answers are tied
        are left out: nothing is learnt from them.
        """
        for answer, feedback in self._last_feedback("corrected" if corrected else "ranking", rater):
            about: dict[str, Any] = {"tools": answer.tools, "rater": feedback.rater}
            its = feedback.ranking
            if corrected:
                fixed = answer.with_correction(feedback.choice, feedback.corrected or "")
                answers = (fixed, answer.choices[feedback.choice])
                yield Comparison(answer.prompt, answers, (0, 1), corrected=True, **about)
            elif its is not None and len(set(its.ranks)) > 1:
                yield Comparison(
                    answer.prompt, tuple(answer.choices), its.ranks, its.scores, its.margin,
                    **about,
                )  # fmt: skip

    def _last_feedback(
        self, kind: str, rater: str | None
    ) -> Iterator[tuple[StoredResponse, Feedback]]:
        """Yield the feedback that counts, with the stored answer, in the order of the answers."""
        by_answer: dict[str, list[Feedback]] = {}
        for row in self.all(_last(kind, rater)):
            feedback = read_feedback(row, self.name)
            by_answer.setdefault(feedback.response_id or "", []).append(feedback)
        for id, answer in self.answers().items():
            size = len(answer.choices)
            for feedback in sorted(by_answer.get(id, ()), key=lambda o: (o.rater or "", o.choice)):
                ranks = () if feedback.ranking is None else feedback.ranking.ranks
                if feedback.choice >= size or len(ranks) not in (0, size):
                    raise InputError(
                        f"{self.name}: expected feedback about {size} choices of {id}, got another"
                    )
                yield answer, feedback

    def export(self, path: str | Path, form: str, *, rater: str | None = None) -> int:
        """Write a .jsonl file, which `read_preferences` reads (`read_conversations`:
        "demonstrations"). Returns how many rows it has.

        ``form``:
        - "pairs": the better and the worse one of every two answers that a rater did not tie, and
          each correction with what it corrects;
        - "ranked": the rankings;
        - "labels": the best and the worst answers of each ranking (`Comparison.labels`);
        - "corrected": the corrections;
        - "demonstrations": conversations that end in a correction.

        InputError: also nothing to export, a rater who did nothing.
        """
        if form not in FORMS:
            raise InputError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
        if rater is not None and rater not in (known := self.raters()):
            raise InputError(f"rater: expected one of {', '.join(known) or 'none'}, got {rater!r}")
        rows = 0
        with atomic_file(Path(path)) as file:
            for corrected in (False, True):
                for comparison in self.comparisons(rater, corrected=corrected):
                    for part in FORMS[form](comparison):
                        file.write(as_json(part.row()).encode() + b"\n")
                        rows += 1
            if not rows:
                raise InputError(
                    f"{self.name}: expected something to export as {form}, got nothing"
                )
        return rows


def _last(kind: str, rater: str | None) -> sa.Select[Any]:
    """Select the last feedback of a kind of each rater, or of one, about each answer."""
    its = FEEDBACK.c
    ids = sa.select(sa.func.max(its.id)).where(its[kind].is_not(None))
    if rater is not None:
        ids = ids.where(its.rater == rater)
    ids = ids.group_by(its.rater, its.response_id, its.choice)
    return FEEDBACK.select().where(its.id.in_(ids)).order_by(its.id)


def _digest(value: Any) -> str:
    return hashlib.sha256(as_json(value).encode()).hexdigest()


def check_rater(rater: str) -> None:
    """InputError unless the name can be printed in a line and stored as it is."""
    if not rater.strip() or not rater.isprintable():
        raise InputError(f"rater: expected a name, got {rater!r:.60}")
    if scrubbed(rater) != rater:
        raise InputError(f"rater: expected a name, no address and no number, got {rater!r:.60}")
