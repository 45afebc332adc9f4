"""What people said about answers, one judgement at a time, from feedback databases and files of
rows.

Of several opinions of one rater about one answer, or about two answers, the last one counts. A
ranking says of every two answers which is better; a tie, or an answer that a rater skipped, takes
back what the rater said of them before.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.conversations import Message, conversation_of, said
from fastlm.data.dedup import content_key
from fastlm.data.forgotten import conversation_key, response_key, talk_key
from fastlm.data.preferences import Label, preference_of
from fastlm.errors import InputError, check_unicode
from fastlm.schema import validate
from fastlm.serve.commands import open_store
from fastlm.serve.responses import latest
from fastlm.sources.rows import list_files, read_rows

if TYPE_CHECKING:
    from fastlm.serve.ratings import Rating
    from fastlm.serve.responses import Feedback, StoredResponse

EXPORTS = (".jsonl", ".ndjson")
ANONYMOUS = ""  # whoever gives no name; all of them count as one rater
# What a rater said, about which answers
Said = tuple[str, str, frozenset[tuple[str, int]]]


@dataclass(frozen=True)
class Judgement:
    """One thing that one rater said. ``kind``:

    - "pick": ``better`` and ``worse`` answer the same prompt;
    - "correction": ``better`` is what the rater wrote in place of ``worse``;
    - "up": ``better`` is good; "down": ``worse`` is not (a thumb, or a number in the better or the
      worse half of its range).

    ids, talks: of the responses it is about, and their conversations. model: that wrote them.
    licence: of the row, where it states one. Without ``prompt`` nobody consented to keep
    the text.
    """

    kind: str
    rater: str
    ids: tuple[str, ...]
    prompt: list[Message] | None = None
    better: list[Message] | None = None
    worse: list[Message] | None = None
    tools: list[Any] | None = None
    model: str | None = None
    licence: str | None = None
    source: str = ""
    talks: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """All text that it holds."""
        messages = [*(self.prompt or ()), *(self.better or ()), *(self.worse or ())]
        return [m["content"] for m in messages if isinstance(m.get("content"), str)]

    @property
    def size(self) -> int:
        return sum(len(text.encode("utf-8", "replace")) for text in self.texts)

    @property
    def prompt_key(self) -> bytes:
        """Equal for prompts that say the same, whatever their case and white space."""
        return _key([said(self.prompt or []), self.tools])

    @property
    def opening_key(self) -> bytes:
        """Equal for prompts with the same first message of a user, whatever stands around it: rows
        of later turns hold the first one and its answer.
        """
        asked = [m for m in self.prompt or () if m.get("role") == "user"]
        return _key(said((asked or self.prompt or [])[:1]))

    @property
    def key(self) -> bytes:
        """Equal for judgements that say the same of the same answers."""
        answers = [said(self.better or []), said(self.worse or [])]
        return self.prompt_key + _key([self.kind, *answers])

    def forgotten_keys(self) -> Iterator[str]:
        """The keys by which it is left out once somebody withdraws (`fastlm.data.forgotten`)."""
        yield from map(response_key, self.ids)
        yield from map(conversation_key, self.talks)
        for answer in (self.better, self.worse):
            if answer is not None:
                yield talk_key([*(self.prompt or ()), *answer])

    def votes(self) -> "Iterator[tuple[bytes, bool]]":
        """What it says that another rater may also say: (of what, yes or no).

        A pick says which of two answers is better, a thumb whether one is good; a correction says
        that the answer is not.
        """
        if self.kind == "pick":
            first, second = sorted((_key(said(self.better or [])), _key(said(self.worse or []))))
            yes = _key(said(self.better or [])) == first
            yield b"pair" + self.prompt_key + first + second, yes
        else:
            answer = self.better if self.kind == "up" else self.worse
            yield b"good" + self.prompt_key + _key(said(answer or [])), self.kind == "up"


def _key(value: Any) -> bytes:
    return content_key(json.dumps(value, ensure_ascii=False, sort_keys=True))


def read_judgements(sources: Sequence[str], cache: Path, passed: Counter[str]) -> list[Judgement]:
    """Return the judgements of all sources: paths or URLs of feedback databases, and .jsonl files
    of rows to train on.

    ``passed`` counts what is no judgement of an answer, by reason.

    InputError: a database that is missing or cannot be used; a line that is no row to train on.
    """
    found: list[Judgement] = []
    for source in sources:
        if is_export(source):
            found += _exported(source, cache)
        else:
            found += _stored(source, passed)
    return found


def is_export(source: str) -> bool:
    return "://" not in source and Path(source).suffix in EXPORTS


def _stored(where: str, passed: Counter[str]) -> list[Judgement]:
    with open_store(where) as store:
        answers, opinions, name = store.answers(), store.opinions(), store.name
        ratings = {rating.name: rating for rating in store.ratings()}
    said = [one for o in opinions for one in _judgements(o, answers, ratings, passed)]
    last = latest(said)
    found = [replace(one, source=name) for one in last.values() if one is not None]
    passed["said again, or otherwise, by the same rater"] += len(said) - len(last)
    passed["answers that a rater tied, or skipped"] += len(last) - len(found)
    return found


def withdrawn_keys(source: str) -> frozenset[str]:
    """The keys of all that was deleted from a database; a file of rows has none."""
    if is_export(source):
        return frozenset()
    with open_store(source) as store:
        return store.withdrawn()


def _judgements(
    opinion: "Feedback",
    answers: "dict[str, StoredResponse]",
    ratings: "dict[str, Rating]",
    passed: Counter[str],
) -> "Iterator[tuple[Said, Judgement | None]]":
    """What an opinion says, by rater and answers. None: no more what the rater said of them."""
    if opinion.response_id is None:
        passed["about a conversation, not an answer"] += 1
        return
    if opinion.kinds() in ([], ["comment"]):
        passed["neither a thumb, a number, a pick nor a correction"] += 1
        return
    rater, key = opinion.rater or ANONYMOUS, (opinion.response_id, opinion.choice)
    own = _answer(answers, key)
    about = frozenset([key])
    base = Judgement("", rater, (opinion.response_id,), **_asked(own), talks=_talks(own))
    thumbs = {"thumb": opinion.thumb} if opinion.thumb else {}
    for name, value in opinion.metrics:
        if (thumb := _thumb_of(ratings.get(name), value)) is None:
            passed["a number in the middle, or of no declared metric of answers"] += 1
        else:
            thumbs[f"number {name}"] = thumb
    for what, thumb in thumbs.items():
        side = "better" if thumb == "up" else "worse"
        yield (what, rater, about), replace(base, kind=thumb, **_side(side, own))
    if opinion.corrected:
        fixed = None if own is None else own[0].corrected(opinion.choice, opinion.corrected)
        better: dict[str, Any] = {"better": fixed}
        yield (
            ("correction", rater, about),
            replace(base, kind="correction", **better, **_side("worse", own)),
        )
    picks = [(key, other) for other in opinion.preferred_over]
    if (ranking := opinion.ranking) is not None:
        every = range(len(ranking.ranks) or (len(own[0].choices) if own is not None else 0))
        ranks = ranking.ranks or [0] * len(every)
        for pair in combinations(every, 2):
            (first, a), (second, b) = sorted((ranks[i], i) for i in pair)
            both = (opinion.response_id, a), (opinion.response_id, b)
            if first < second:
                picks.append(both)
            else:
                yield ("pick", rater, frozenset(both)), None
    for best, other in picks:
        own, worse = _answer(answers, best), _answer(answers, other)
        ids = tuple(dict.fromkeys((best[0], other[0])))
        pick = replace(base, kind="pick", ids=ids, talks=_talks(own, worse))
        if own is None or worse is None:
            pick = replace(pick, prompt=None)
        elif (own[0].prompt, own[0].tools) != (worse[0].prompt, worse[0].tools):
            passed["a pick between answers to different prompts"] += 1
            continue
        else:
            pick = replace(pick, **_side("better", own), **_side("worse", worse))
        yield ("pick", rater, frozenset((best, other))), pick


def _thumb_of(rating: "Rating | None", value: float) -> str | None:
    """What a number about an answer says; None: nothing."""
    return None if rating is None or rating.level != "response" else rating.thumb(value)


def _answer(
    answers: "dict[str, StoredResponse]", key: tuple[str, int]
) -> "tuple[StoredResponse, list[Message]] | None":
    kept = answers.get(key[0])
    return None if kept is None or key[1] >= len(kept.choices) else (kept, kept.choices[key[1]])


def _asked(found: "tuple[StoredResponse, list[Message]] | None") -> dict[str, Any]:
    if found is None:
        return {}
    return {"prompt": found[0].prompt, "tools": found[0].tools, "model": found[0].model or None}


def _talks(*found: "tuple[StoredResponse, list[Message]] | None") -> tuple[str, ...]:
    ids = [one[0].conversation_id for one in found if one is not None]
    return tuple(dict.fromkeys(id for id in ids if id is not None))


def _side(name: str, found: "tuple[StoredResponse, list[Message]] | None") -> dict[str, Any]:
    return {} if found is None else {name: found[1]}


def _exported(path: str, cache: Path) -> Iterator[Judgement]:
    for file in list_files(path, cache=cache)[0]:
        for number, row in read_rows(file):
            if isinstance(row, InputError):
                raise row
            try:
                yield from _of_row(row, path)
            except InputError as error:
                raise InputError(f"{file.path}, line {number}: {error}") from None


@dataclass(frozen=True)
class RowProvenance:
    """Where a row is from."""

    responses: list[str] = field(default_factory=list)
    conversations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RowFacts:
    """What a row says beside its texts."""

    rater: str | None = None
    model: str | None = None
    licence: str | None = None
    provenance: RowProvenance | None = None


def _of_row(row: Any, source: str) -> Iterator[Judgement]:
    known = row if isinstance(row, dict) else {}
    names = [item.name for item in fields(RowFacts)]
    given = {name: known[name] for name in names if name in known}
    for name, value in given.items():
        if isinstance(value, str):
            check_unicode(value, name)
    facts = validate(given, RowFacts, "", extra="forbid")
    origin = facts.provenance or RowProvenance()
    told: dict[str, Any] = {
        "ids": tuple(origin.responses), "talks": tuple(origin.conversations),
        "licence": facts.licence, "model": facts.model, "source": source,
    }  # fmt: skip
    if "messages" in known and "label" not in known and "kto_tag" not in known:
        talk = conversation_of(row)
        prompt, answer = talk.messages[:-1], talk.messages[-1:]
        yield Judgement(
            "up", facts.rater or ANONYMOUS, prompt=prompt, better=answer, tools=talk.tools,
            **told,
        )  # fmt: skip
        return
    found = preference_of(row)
    rater = found.rater or ANONYMOUS
    if isinstance(found, Label):
        sides = {"better" if found.desirable else "worse": found.answer}
        kind = "up" if found.desirable else "down"
        yield Judgement(kind, rater, prompt=found.prompt, tools=found.tools, **sides, **told)
        return
    for pair in found.pairs():
        better, worse = pair.answers
        kind = "correction" if pair.corrected else "pick"
        yield Judgement(
            kind, rater, prompt=pair.prompt, better=better, worse=worse, tools=pair.tools, **told
        )
