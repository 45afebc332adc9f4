"""A store of answers to prompts and of their ranks by several raters: one SQLite file.

An item is a prompt with its answers. A judgement is one rater's ranks of an item, or that the rater
skipped it. A rater may correct answers, too. Each change is one transaction (`SqliteFile`), so that
raters can work at the same time and lose nothing.

`fastlm.feedback.rank_terminal` is the way to judge in a terminal.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from fastlm.data.conversations import Message, Rows, read_examples, said
from fastlm.data.preferences import Comparison, Label, Unranked, answers_of
from fastlm.errors import InputError, check_unicode, show
from fastlm.files import parse_json, replacing
from fastlm.serve.sqlite_file import SqliteFile
from fastlm.sources.rows import ignore
from fastlm.stats.agreement import Agreement, agreement_of

FILE_RATER = "file"  # the rater of rows that were ranked already and name nobody
FORMS = ("pairs", "ranked", "labels", "corrected", "demonstrations")
SCHEMA = """
CREATE TABLE items (
    id INTEGER PRIMARY KEY,
    prompt TEXT NOT NULL,           -- JSON: messages
    tools TEXT,                     -- JSON: a list
    place TEXT NOT NULL,            -- where the item came from
    digest TEXT NOT NULL UNIQUE     -- of prompt, tools and answers in any order
);
CREATE INDEX items_of_prompt ON items (prompt);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY,
    item INTEGER NOT NULL REFERENCES items,
    messages TEXT NOT NULL          -- JSON
);
CREATE INDEX answers_of_item ON answers (item);
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY,
    item INTEGER NOT NULL REFERENCES items,
    rater TEXT NOT NULL,
    skipped INTEGER NOT NULL,
    margin REAL,
    judged_at TEXT NOT NULL,        -- ISO 8601, UTC
    UNIQUE (rater, item)
);
CREATE INDEX judgements_of_item ON judgements (item);
CREATE TABLE ranks (
    judgement INTEGER NOT NULL REFERENCES judgements ON DELETE CASCADE,
    answer INTEGER NOT NULL REFERENCES answers,
    rank INTEGER NOT NULL,          -- 0 is the best, equal for ties, none is left out
    shown INTEGER NOT NULL,         -- the answer's place on the rater's screen, from 0
    score REAL,
    PRIMARY KEY (judgement, answer)
) WITHOUT ROWID;
CREATE TABLE corrections (
    answer INTEGER NOT NULL REFERENCES answers,
    rater TEXT NOT NULL,
    messages TEXT NOT NULL,         -- JSON: the answer as it should be
    corrected_at TEXT NOT NULL,
    PRIMARY KEY (answer, rater)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """``messages``: from the assistant's first to its last."""

    id: int
    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its answers, in the order in which the rater sees them."""

    id: int
    prompt: list[Message]
    answers: tuple[Answer, ...]
    tools: list[Any] | None
    place: str


@dataclass
class Added:
    """How many items and judgements an import added, and how many the store had already."""

    items: int = 0
    judgements: int = 0
    corrections: int = 0
    known: int = 0


@dataclass
class RaterCounts:
    """How many items a rater ranked and skipped, and how many answers he or she corrected."""

    ranked: int = 0
    skipped: int = 0
    corrected: int = 0


def read_answers(
    sources: Sequence[str],
    *,
    cache: Path,
    skip_bad: bool = False,
    rows: Rows | None = None,
    tell: Callable[[str], None] = ignore,
) -> Iterator[Comparison | Unranked]:
    """Yield what `RankingStore.add` takes from files or packages, as `read_preferences` does; a row
    with a label, which has one answer, is a bad row.
    """

    def example_of(row: Any, place: str) -> Comparison | Unranked:
        example = answers_of(row, place)
        if isinstance(example, Label):
            raise InputError("wanted two or more answers to rank, got one with a label")
        return example

    return read_examples(sources, example_of, cache=cache, skip_bad=skip_bad, rows=rows, tell=tell)


class RankingStore(SqliteFile):
    """The store in the file ``path``; ``create`` makes a missing one. A context manager.

    ``seed`` draws the orders in which answers are shown. InputError, from every method: also what
    `SqliteFile` says.
    """

    kind, schema = "store of answers to rank", SCHEMA
    application_id, version = 0x66526E6B, 1  # "fRnk"

    def __init__(self, path: str | Path, *, create: bool = False, seed: int = 0):
        self.seed = seed
        super().__init__(path, create=create)

    # ---- items

    def add(self, examples: Iterable[Comparison | Unranked]) -> Added:
        """Add prompts with answers, all or none. Ranks become a judgement of the example's rater
        ("file" if it names none). What the store has already is counted and left unchanged.
        """
        added = Added()
        with self.transaction():
            for example in examples:
                self._add(example, added)
        return added

    def _add(self, example: Comparison | Unranked, added: Added) -> None:
        ranked = example if isinstance(example, Comparison) else None
        answers = example.answers
        if ranked is not None and ranked.corrected:  # the better one is no answer of a model
            (ranked,) = ranked.pairs()
            answers = ranked.answers[1:]
        item, ids, new = self._item(example, answers)
        added.items += new
        if ranked is None:
            added.known += not new
            return
        rater, now = ranked.rater or FILE_RATER, _now()
        if ranked.corrected:
            done = self.db.execute(
                "INSERT INTO corrections VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (ids[0], rater, _json(ranked.answers[0]), now),
            )
            added.corrections += done.rowcount
        else:
            done = self.db.execute(
                "INSERT INTO judgements (item, rater, skipped, margin, judged_at)"
                " VALUES (?, ?, 0, ?, ?) ON CONFLICT DO NOTHING",
                (item, rater, ranked.margin, now),
            )
            if done.rowcount:
                scores = ranked.scores or (None,) * len(ids)
                self._set_ranks(done.lastrowid, zip(ids, ranked.ranks, scores))
            added.judgements += done.rowcount
        added.known += not (new or done.rowcount)

    def _item(
        self, example: Comparison | Unranked, answers: Sequence[list[Message]]
    ) -> tuple[int, list[int], bool]:
        """The item of a prompt with these answers, its answers' ids in their order here, and
        whether it is new.
        """
        texts = [_json(said(answer)) for answer in answers]
        digest = _digest([said(example.prompt), sorted(texts), example.tools])
        known = self.db.execute("SELECT id FROM items WHERE digest = ?", (digest,)).fetchone()
        if known:
            ids: dict[str, list[int]] = {}
            for answer in self._answers(known[0]):
                ids.setdefault(_json(said(answer.messages)), []).append(answer.id)
            return known[0], [ids[text].pop(0) for text in texts], False
        tools = None if example.tools is None else _json(example.tools)
        item = self.db.execute(
            "INSERT INTO items (prompt, tools, place, digest) VALUES (?, ?, ?, ?)",
            (_json(example.prompt), tools, example.place, digest),
        ).lastrowid
        assert item is not None
        new = []
        for answer in answers:
            row = (item, _json(answer))
            done = self.db.execute("INSERT INTO answers (item, messages) VALUES (?, ?)", row)
            new.append(done.lastrowid)
        return item, new, True

    def has_prompt(self, prompt: list[Message], tools: list[Any] | None) -> bool:
        """Whether the store has answers to this prompt."""
        key = (_json(prompt), None if tools is None else _json(tools))
        with self.errors():
            found = self.db.execute("SELECT 1 FROM items WHERE prompt = ? AND tools IS ?", key)
            return found.fetchone() is not None

    def item(self, id: int, rater: str) -> Item:
        """The item with this id. The rater sees its answers in an order drawn from the store's
        seed, the rater and the item.
        """
        with self.errors():
            row = self.db.execute(
                "SELECT prompt, tools, place, digest FROM items WHERE id = ?", (id,)
            ).fetchone()
            if row is None:
                raise InputError(f"item: wanted one of the store, got {id}")
            answers = self._answers(id)
        prompt, tools, place, digest = row
        random.Random(_digest([self.seed, rater, digest])).shuffle(answers)
        tools = None if tools is None else self._parsed(tools)
        return Item(id, self._parsed(prompt), tuple(answers), tools, place)

    def next_item(self, rater: str, *, after: int = 0, skipped: bool = False) -> Item | None:
        """The first item, of those with an id above ``after``, that the rater has not judged; or,
        with ``skipped``, that the rater skipped. None: there is none.
        """
        state = "j.skipped" if skipped else "j.item IS NULL"
        with self.errors():
            row = self.db.execute(
                "SELECT i.id FROM items i LEFT JOIN judgements j ON j.item = i.id AND j.rater = ?"
                f" WHERE i.id > ? AND {state} AND {_SEVERAL} ORDER BY i.id LIMIT 1",
                (rater, after),
            ).fetchone()
        return None if row is None else self.item(row[0], rater)

    def progress(self, rater: str) -> tuple[RaterCounts, int]:
        """(what the rater has done, how many items there are to rank)."""
        with self.errors():
            (total,) = self.db.execute(f"SELECT count(*) FROM items i WHERE {_SEVERAL}").fetchone()
        return self.raters().get(rater, RaterCounts()), total

    def _answers(self, item: int) -> list[Answer]:
        rows = self.db.execute(
            "SELECT id, messages FROM answers WHERE item = ? ORDER BY id", (item,)
        )
        return [Answer(id, self._parsed(messages)) for id, messages in rows.fetchall()]

    # ---- judgements

    def judge(self, rater: str, item: Item, ranks: Sequence[int]) -> None:
        """Store the rater's ranks of an item, instead of earlier ones. ``ranks``: in the order of
        ``item.answers``, 0 is the best, equal for ties.
        """
        if len(ranks) != len(item.answers):
            raise InputError(
                f"ranks: wanted one for each of {len(item.answers)} answers, got {len(ranks)}"
            )
        for rank in ranks:
            if type(rank) is not int or not 0 <= rank < len(ranks):
                raise InputError(
                    f"ranks: wanted whole numbers from 0 to {len(ranks) - 1}, got {show(rank):.60}"
                )
        places = sorted(set(ranks))
        dense = (places.index(rank) for rank in ranks)
        with self.transaction():
            judgement = self._judgement(rater, item, skipped=False)
            ids = (answer.id for answer in item.answers)
            self._set_ranks(judgement, ((id, rank, None) for id, rank in zip(ids, dense)))

    def skip(self, rater: str, item: Item) -> None:
        """Store that the rater skipped the item."""
        with self.transaction():
            self._judgement(rater, item, skipped=True)

    def correct(self, rater: str, item: Item, answer: Answer, text: str) -> None:
        """Store the text that the rater would have the last message of the answer say, instead of
        an earlier correction.
        """
        check_rater(rater)
        check_unicode(text, "correction")
        if not text.strip():
            raise InputError("correction: wanted text, got an empty one")
        *before, last = answer.messages
        if text.strip() == last["content"].strip():
            raise InputError("correction: wanted another text than the answer, got the same")
        fixed = [*before, {**last, "content": text}]
        with self.transaction():
            self.db.execute(
                "INSERT INTO corrections VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
                " SET messages = excluded.messages, corrected_at = excluded.corrected_at",
                (answer.id, rater, _json(fixed), _now()),
            )

    def _judgement(self, rater: str, item: Item, *, skipped: bool) -> int:
        """A new judgement without ranks, instead of an earlier one."""
        check_rater(rater)
        earlier = (rater, item.id)
        self.db.execute("DELETE FROM judgements WHERE rater = ? AND item = ?", earlier)
        done = self.db.execute(
            "INSERT INTO judgements (item, rater, skipped, judged_at) VALUES (?, ?, ?, ?)",
            (item.id, rater, skipped, _now()),
        )
        assert done.lastrowid is not None
        return done.lastrowid

    def _set_ranks(
        self, judgement: int | None, ranks: Iterable[tuple[int, int, float | None]]
    ) -> None:
        """Store (answer, rank, score) in the order in which the answers were shown."""
        self.db.executemany(
            "INSERT INTO ranks (judgement, shown, answer, rank, score) VALUES (?, ?, ?, ?, ?)",
            [(judgement, shown, *row) for shown, row in enumerate(ranks)],
        )

    # ---- results

    def raters(self) -> dict[str, RaterCounts]:
        """What each rater has done, by name."""
        found: dict[str, RaterCounts] = {}
        with self.errors():
            for rater, ranked, skipped in self.db.execute(
                "SELECT rater, sum(NOT skipped), sum(skipped) FROM judgements GROUP BY rater"
            ):
                found[rater] = RaterCounts(ranked, skipped)
            for rater, corrected in self.db.execute(
                "SELECT rater, count(*) FROM corrections GROUP BY rater"
            ):
                found.setdefault(rater, RaterCounts()).corrected = corrected
        return dict(sorted(found.items()))

    def agreement(self) -> Agreement:
        """How far the raters agree, on all items that two or more ranked."""
        rankings: dict[int, dict[str, list[int]]] = {}
        for (item, rater, _), ranks in self._rankings(None):
            rankings.setdefault(item, {})[rater] = [rank for _, rank, _ in ranks]
        return agreement_of(rankings.values())

    def comparisons(self, rater: str | None = None) -> Iterator[Comparison]:
        """The rankings (of one rater, if named), item by item. Those in which all answers are tied
        are left out: nothing is learnt from them.
        """
        for (id, name, margin), ranked in self._rankings(rater):
            ids, ranks, given = zip(*ranked)
            if len(set(ranks)) < 2:
                continue
            item = self.item(id, name)
            messages = {answer.id: answer.messages for answer in item.answers}
            answers = tuple(messages[id] for id in ids)
            scores = None if None in given else given
            yield Comparison(
                item.prompt, answers, ranks, scores, margin, item.tools, name, place=item.place
            )

    def corrections(self, rater: str | None = None) -> Iterator[Comparison]:
        """The corrected answers (of one rater, if named), each better than the one that it
        corrects.
        """
        with self.errors():
            found = self.db.execute(
                "SELECT a.item, a.messages, c.rater, c.messages FROM corrections c"
                " JOIN answers a ON a.id = c.answer WHERE ?1 IS NULL OR c.rater = ?1"
                " ORDER BY a.item, a.id, c.rater",
                (rater,),
            ).fetchall()
        for id, answer, name, corrected in found:
            item = self.item(id, name)
            answers = (self._parsed(corrected), self._parsed(answer))
            yield Comparison(
                item.prompt, answers, (0, 1), tools=item.tools, rater=name, corrected=True,
                place=item.place,
            )  # fmt: skip

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
            raise InputError(f"form: wanted one of {', '.join(FORMS)}, got {form!r}")
        if rater is not None and rater not in (known := self.raters()):
            raise InputError(f"rater: wanted one of {', '.join(known) or 'none'}, got {rater!r}")
        rows = 0
        with replacing(Path(path)) as file:
            for row in self._rows(form, rater):
                file.write(_json(row).encode() + b"\n")
                rows += 1
            if not rows:
                raise InputError(f"{self.path}: wanted something to export as {form}, got nothing")
        return rows

    def _rows(self, form: str, rater: str | None) -> Iterator[dict[str, Any]]:
        if form in ("pairs", "ranked", "labels"):
            for ranking in self.comparisons(rater):
                if form == "ranked":
                    yield ranking.row()
                else:
                    parts = ranking.pairs() if form == "pairs" else ranking.labels()
                    yield from (part.row() for part in parts)
        if form in ("pairs", "corrected", "demonstrations"):
            for correction in self.corrections(rater):
                if form == "demonstrations":
                    yield correction.demonstration().row()
                else:
                    yield replace(correction, corrected=form == "corrected").row()

    def _rankings(self, rater: str | None) -> Iterator[tuple[Any, list[Any]]]:
        """((item, rater, margin), [(answer, rank, score), ...] in the stored order) of every
        ranked item.
        """
        with self.errors():
            found = self.db.execute(
                "SELECT j.item, j.rater, j.margin, r.answer, r.rank, r.score FROM judgements j"
                " JOIN ranks r ON r.judgement = j.id WHERE ?1 IS NULL OR j.rater = ?1"
                " ORDER BY j.item, j.rater, r.answer",
                (rater,),
            ).fetchall()
        for key, rows in groupby(found, lambda row: row[:3]):
            yield key, [row[3:] for row in rows]

    def _parsed(self, text: str) -> Any:
        return parse_json(text, self.path)


# an item with one answer, which came with its correction, is not to be ranked
_SEVERAL = "(SELECT count(*) FROM answers a WHERE a.item = i.id) > 1"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_rater(rater: str) -> None:
    """InputError unless the name can be printed in a line."""
    if not rater.strip() or not rater.isprintable():
        raise InputError(f"rater: wanted a name, got {rater!r:.60}")
