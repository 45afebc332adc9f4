"""Store answers that people rank, in a feedback database (`fastlm.serve.feedback_store`).

An item is a stored response with several choices: from imported rows, sampled from a model, or from
`fastlm serve` if a user consented. A rater's order of the choices is feedback with a `Ranking`. The
last ranking of a rater counts, and ``fastlm feedback build`` reads it as picks.

`fastlm.feedback.rank_terminal` ranks in a terminal.
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
from fastlm.data.preferences import Comparison, UnpairedPreference, UnrankedAnswers, parse_answers
from fastlm.errors import InputError, check_unicode, show
from fastlm.files import atomic_file
from fastlm.pipeline import rater_terminal
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
from fastlm.serve.tables import FEEDBACK, RESPONSES, WITHDRAWN
from fastlm.sources.source_files import ignore_message
from fastlm.stats.agreement import Agreement, agreement_of

FILE_RATER = "file"  # the rater of imported rankings without a rater
FORMS: dict[
    str, Callable[[Comparison], Sequence[Comparison | UnpairedPreference | Conversation]]
] = {
    "pairs": lambda c: [replace(pair, corrected=False) for pair in c.pairs()],
    "ranked": lambda c: [] if c.corrected else [c],
    "labels": lambda c: [] if c.corrected else c.labels(),
    "corrected": lambda c: [c] if c.corrected else [],
    "demonstrations": lambda c: [c.demonstration()] if c.corrected else [],
}
HAS_CHOICES = RESPONSES.c.num_choices > 1


@dataclass(frozen=True, slots=True)
class RankingItem:
    """A prompt and its answers, in the order in which the rater sees them. ``display_order``: the
    index of each in the choices of the stored response. An answer has the messages from the
    assistant's first to its last.
    """

    id: int
    response_id: str
    prompt: list[Message]
    answers: tuple[list[Message], ...]
    display_order: tuple[int, ...]
    tools: list[Any] | None


@dataclass
class ImportCounts:
    """The counts of an import: ``items`` and ``rankings`` that it added, ``duplicates`` that the
    store had already, and ``indistinct`` rows with answers that differ only in personal data.
    """

    items: int = 0
    rankings: int = 0
    corrections: int = 0
    duplicates: int = 0
    indistinct: int = 0


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
    """Yield rows for `RankingStore.add_items` from files or packages, as `read_preferences` does.
    These rows are bad, too: a row with a label, which has one answer; a correction that changes
    more than the text of the last message; a rater with an address or a number as name.
    """

    def parse(row: Any, location: str) -> Comparison | UnrankedAnswers:
        example = parse_answers(row, location)
        if isinstance(example, UnpairedPreference):
            raise InputError("expected two or more answers to rank, got one with a label")
        if isinstance(example, Comparison):
            check_rater(example.rater or FILE_RATER)
            if example.corrected:
                _corrected_text(example)
        return example

    return read_examples(sources, parse, cache=cache, skip_bad=skip_bad, rows=rows, on_skip=on_skip)


def _corrected_text(correction: Comparison) -> str:
    (pair,) = correction.pairs()
    correction_messages, answer = pair.answers
    text = correction_messages[-1]["content"]
    if message_contents(correction_messages) != message_contents(
        [*answer[:-1], {"role": "assistant", "content": text}]
    ):
        raise InputError("corrected: expected the answer with another last text, got more changes")
    return text


class RankingStore(FeedbackStore):
    """A feedback database with answers that people rank. ``seed`` draws the display orders.
    InputError, from every method: as `FeedbackStore`.
    """

    def __init__(self, location: str | Path, *, create: bool = True, seed: int = 0):
        self.seed = seed
        super().__init__(location, create=create)

    # ---- items

    def add_items(
        self, examples: Iterable[Comparison | UnrankedAnswers], model: str = ""
    ) -> ImportCounts:
        """Add prompts with answers (of ``model``), all or none. Ranks become feedback of the
        example's rater, or of "file". Duplicates are counted and not changed. Forgotten items are
        not stored again.
        """
        counts = ImportCounts()
        with self.write() as connection:
            withdrawn = frozenset(connection.execute(sa.select(WITHDRAWN.c.key)).scalars())
            for example in examples:
                self._add(connection, example, model, withdrawn, counts)
        return counts

    def _add(
        self, connection: sa.Connection, example: Comparison | UnrankedAnswers, model: str,
        withdrawn: frozenset[str], counts: ImportCounts,
    ) -> None:  # fmt: skip
        ranked = example if isinstance(example, Comparison) else None
        answers, corrected = list(example.answers), False
        if ranked is not None and ranked.corrected:  # the correction is not an answer of a model
            answers, corrected = [ranked.pairs()[0].answers[1]], True
        row = row_of(StoredResponse("", model, example.prompt, answers, example.tools))
        choices = json.loads(row["choices"])
        texts = [as_json(message_contents(choice)) for choice in choices]
        order = sorted(
            range(len(texts)), key=texts.__getitem__
        )  # so that the order in the row does not matter
        ranks = range(len(texts)) if ranked is None or corrected else ranked.ranks
        if len(set(texts)) < len(set(zip(texts, ranks))):
            counts.indistinct += 1
            return
        content = [message_contents(json.loads(row["prompt"])), sorted(texts), row["tools"]]
        id = f"rank-{_digest(content)[:32]}"
        row |= {"response_id": id, "choices": as_json([choices[i] for i in order])}
        new = response_key(id) not in withdrawn
        is_item = new and self.insert_new(connection, RESPONSES, row)
        if new and ranked is not None:
            new = self._add_feedback(connection, id, ranked, order)
            counts.corrections += new and corrected
            counts.rankings += new and not corrected
        else:
            new = is_item
        counts.items += is_item and not corrected  # one choice: nothing to rank
        counts.duplicates += not (new or is_item)

    def _add_feedback(
        self, connection: sa.Connection, id: str, ranked: Comparison, order: list[int]
    ) -> bool:
        """Store the ranking or correction of a row. Return False if its rater has one already."""
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
        """Return whether the store has several answers to this prompt."""
        column = RESPONSES.c.tools
        same_tools = column.is_(None) if tools is None else column == as_json(scrubbed(tools))
        same_prompt = RESPONSES.c.prompt == as_json(scrubbed(prompt))
        query = sa.select(RESPONSES.c.id).where(HAS_CHOICES, same_prompt, same_tools)
        return self.first(query) is not None

    def item(self, id: int, rater: str) -> RankingItem:
        """Return the item with this id. The display order depends on the store's seed, the rater
        and the item.
        """
        row = self.first(RESPONSES.select().where(HAS_CHOICES, RESPONSES.c.id == id))
        if row is None:
            raise InputError(f"item: expected one of the store, got {id}")
        response = read_response(row, self.name)
        order = list(range(len(response.choices)))
        random.Random(_digest([self.seed, rater, response.response_id])).shuffle(order)
        return RankingItem(
            id, response.response_id, response.prompt,
            tuple(response.choices[i] for i in order), tuple(order), response.tools,
        )  # fmt: skip

    def next_item(self, rater: str, *, after: int = 0, skipped: bool = False) -> RankingItem | None:
        """Return the first item with an id above ``after`` that the rater has not ranked or
        skipped; or, with ``skipped``, that the rater skipped. None: there is none.
        """
        f = FEEDBACK.c
        by_rater = (
            f.response_id == RESPONSES.c.response_id,
            f.rater == rater,
            f.ranking.is_not(None),
        )
        # one look-up per item, so that a call does not read the last feedback of all items
        last = (
            sa.select(f.ranking).where(*by_rater).order_by(f.id.desc()).limit(1).scalar_subquery()
        )
        state = last == SKIPPED if skipped else last.is_(None)
        query = sa.select(RESPONSES.c.id).where(HAS_CHOICES, RESPONSES.c.id > after, state)
        row = self.first(query.order_by(RESPONSES.c.id))
        return None if row is None else self.item(row.id, rater)

    def progress(self, rater: str) -> tuple[RaterCounts, int]:
        """Return (the counts of the rater, the number of items)."""
        check_rater(rater)
        (total,) = self.first(sa.select(sa.func.count(RESPONSES.c.id)).where(HAS_CHOICES))
        return self.raters(rater).get(rater, RaterCounts()), total

    # ---- feedback

    def rank(self, rater: str, item: RankingItem, ranks: Sequence[int]) -> None:
        """Store the rater's ranks of an item. ``ranks``: in the order of ``item.answers``; 0 is the
        best, ties are equal.
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
        levels = sorted(set(ranks))
        by_choice = dict(zip(item.display_order, map(levels.index, ranks)))
        choice_ranks = tuple(by_choice[choice] for choice in range(len(ranks)))
        self._add_for(rater, item, ranking=Ranking(choice_ranks, item.display_order))

    def skip(self, rater: str, item: RankingItem) -> None:
        """Store that the rater skipped the item."""
        self._add_for(rater, item, ranking=Ranking())

    def correct(self, rater: str, item: RankingItem, number: int, text: str) -> None:
        """Store the rater's text for the last message of an answer. ``number``: its index in
        ``item.answers``.
        """
        check_unicode(text, "correction")
        if not text.strip():
            raise InputError("correction: expected text, got an empty one")
        if text.strip() == item.answers[number][-1]["content"].strip():
            raise InputError("correction: expected another text than the answer, got the same")
        self._add_for(rater, item, choice=item.display_order[number], corrected=text)

    def _add_for(self, rater: str, item: RankingItem, **fields: Any) -> None:
        check_rater(rater)
        if self.add(Feedback(item.response_id, rater=rater, **fields)) is None:
            raise InputError(f"item: expected one of the store, got {item.id}, which was forgotten")

    # ---- results

    def raters(self, rater: str | None = None) -> dict[str, RaterCounts]:
        """Return the counts of each rater, by name; or only of this one."""
        by_rater: dict[str, RaterCounts] = {}
        for kind in ("ranking", "corrected"):
            for row in self.all(_last(kind, rater)):
                counts = by_rater.setdefault(row.rater or "", RaterCounts())
                counts.corrected += kind == "corrected"
                counts.skipped += kind == "ranking" and row.ranking == SKIPPED
                counts.ranked += kind == "ranking" and row.ranking != SKIPPED
        return dict(sorted(by_rater.items()))

    def agreement(self) -> Agreement:
        """Return how far the raters agree on the items that two or more ranked."""
        rankings: dict[str, dict[str, Sequence[int]]] = {}
        for response, feedback in self._last_feedback("ranking", None):
            if feedback.ranking is not None and feedback.ranking.ranks:
                by_rater = rankings.setdefault(response.response_id, {})
                by_rater[feedback.rater or ""] = feedback.ranking.ranks
        return agreement_of(rankings.values())

    def agreement_report(self) -> dict[str, Any]:
        """Return `agreement` and `raters` as JSON; alpha is None if it is undefined."""
        report, raters = asdict(self.agreement()), self.raters()
        alpha = None if math.isnan(report["alpha"]) else report["alpha"]
        return {**report, "alpha": alpha, "raters": {name: asdict(n) for name, n in raters.items()}}

    def comparisons(
        self, rater: str | None = None, *, corrected: bool = False
    ) -> Iterator[Comparison]:
        """Yield the rankings (of one rater, if given), item by item; or with ``corrected`` the
        corrections, each better than the answer that it corrects. Rankings in which all answers are
        tied are left out, since no training can learn from them.
        """
        for response, feedback in self._last_feedback(
            "corrected" if corrected else "ranking", rater
        ):
            metadata: dict[str, Any] = {"tools": response.tools, "rater": feedback.rater}
            ranking = feedback.ranking
            if corrected:
                correction = response.with_correction(feedback.choice, feedback.corrected or "")
                answers = (correction, response.choices[feedback.choice])
                yield Comparison(response.prompt, answers, (0, 1), corrected=True, **metadata)
            elif ranking is not None and len(set(ranking.ranks)) > 1:
                yield Comparison(
                    response.prompt, tuple(response.choices), ranking.ranks, ranking.scores,
                    ranking.margin, **metadata,
                )  # fmt: skip

    def _last_feedback(
        self, kind: str, rater: str | None
    ) -> Iterator[tuple[StoredResponse, Feedback]]:
        """Yield the feedback that counts, with the stored answer, in the order of the answers."""
        by_response: dict[str, list[Feedback]] = {}
        for row in self.all(_last(kind, rater)):
            feedback = read_feedback(row, self.name)
            by_response.setdefault(feedback.response_id or "", []).append(feedback)
        for id, response in self.responses().items():
            size = len(response.choices)
            for feedback in sorted(
                by_response.get(id, ()), key=lambda o: (o.rater or "", o.choice)
            ):
                ranks = () if feedback.ranking is None else feedback.ranking.ranks
                if feedback.choice >= size or len(ranks) not in (0, size):
                    raise InputError(
                        f"{self.name}: expected feedback about {size} choices of {id}, got another"
                    )
                yield response, feedback

    def export(self, path: str | Path, form: str, *, rater: str | None = None) -> int:
        """Write a .jsonl file for `read_preferences` (for `read_conversations` if ``form`` is
        "demonstrations"). Return the number of rows.

        ``form``:
        - "pairs": the better and the worse one of every two answers that a rater did not tie, and
          each correction with the answer that it corrects;
        - "ranked": the rankings;
        - "labels": the best and the worst answers of each ranking (`Comparison.labels`);
        - "corrected": the corrections;
        - "demonstrations": conversations that end in a correction.

        InputError: also nothing to export, a rater without feedback.
        """
        if form not in FORMS:
            raise InputError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
        if rater is not None and rater not in (raters := self.raters()):
            raise InputError(f"rater: expected one of {', '.join(raters) or 'none'}, got {rater!r}")
        rows = 0
        with atomic_file(Path(path)) as file:
            for corrected in (False, True):
                for comparison in self.comparisons(rater, corrected=corrected):
                    for example in FORMS[form](comparison):
                        file.write(as_json(example.to_row()).encode() + b"\n")
                        rows += 1
            if not rows:
                raise InputError(
                    f"{self.name}: expected something to export as {form}, got nothing"
                )
        return rows


def _last(kind: str, rater: str | None) -> sa.Select[Any]:
    """Select the last feedback of a kind of each rater, or of one, about each answer."""
    f = FEEDBACK.c
    ids = sa.select(sa.func.max(f.id)).where(f[kind].is_not(None))
    if rater is not None:
        ids = ids.where(f.rater == rater)
    ids = ids.group_by(f.rater, f.response_id, f.choice)
    return FEEDBACK.select().where(f.id.in_(ids)).order_by(f.id)


def _digest(value: Any) -> str:
    return hashlib.sha256(as_json(value).encode()).hexdigest()


def check_rater(rater: str) -> None:
    """Check that the name can be printed in one line and stored unchanged. InputError: not so."""
    rater_terminal.check_rater(rater)
    if scrubbed(rater) != rater:
        raise InputError(f"rater: expected a name, no address and no number, got {rater!r:.60}")
