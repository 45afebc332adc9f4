"""What people said about answers, one judgement at a time, from feedback databases and files of
rows.

If a rater gave feedback several times about one answer, or about two answers, the last one counts.
A ranking says of every two answers which is better. A tie, or a ranking that a rater skipped,
cancels what the rater said of these answers before.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.conversations import Message, conversation_of, read_examples, said
from fastlm.data.dedup import content_key
from fastlm.data.forgotten import conversation_key, response_key, talk_key
from fastlm.data.preferences import Label, preference_of
from fastlm.errors import check_unicode
from fastlm.schema import validate
from fastlm.serve.commands import open_store
from fastlm.serve.responses import latest

if TYPE_CHECKING:
    from fastlm.serve.ratings import Rating
    from fastlm.serve.responses import Feedback, StoredResponse

    Texts = dict["Choice", tuple[StoredResponse, list[Message]]]  # that are kept

EXPORTS = (".jsonl", ".ndjson")
ANONYMOUS = ""  # whoever gives no name; all of them count as one rater
Choice = tuple[str, int]  # of a response
Said = tuple[str, str, frozenset[Choice]]  # what, by whom, about which answers


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

    def vote(self) -> tuple[bytes, str, bool]:
        """What it says that another rater may also say: (of what, by whom, yes or no).

        A pick says which of two answers is better, a thumb whether one is good; a correction says
        that the answer is not.
        """
        better, worse = _key(said(self.better or [])), _key(said(self.worse or []))
        if self.kind == "pick":
            first, second = sorted((better, worse))
            return b"pair" + self.prompt_key + first + second, self.rater, better == first
        up = self.kind == "up"
        return b"good" + self.prompt_key + (better if up else worse), self.rater, up


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
            for rows in read_examples([source], lambda row, _: [*_of_row(row)], cache=cache):
                found += [replace(one, source=source) for one in rows]
        else:
            found += _stored(source, passed)
    return found


def is_export(source: str) -> bool:
    return "://" not in source and Path(source).suffix in EXPORTS


def _stored(where: str, passed: Counter[str]) -> list[Judgement]:
    with open_store(where) as store:
        answers, feedback_rows, name = store.answers(), store.all_feedback(), store.name
        ratings = {rating.name: rating for rating in store.ratings()}
    texts = {
        (id, choice): (answer, messages)
        for id, answer in answers.items()
        for choice, messages in enumerate(answer.choices)
    }
    said = [
        one for feedback in feedback_rows for one in _judgements(feedback, texts, ratings, passed)
    ]
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
    feedback: "Feedback", texts: "Texts", ratings: "dict[str, Rating]", passed: Counter[str]
) -> "Iterator[tuple[Said, Judgement | None]]":
    """What a feedback row says, by rater and answers. None: no more what the rater said of them."""
    if feedback.response_id is None:
        passed["about a conversation, not an answer"] += 1
        return
    if feedback.kinds() in ([], ["comment"]):
        passed["neither a thumb, a number, a pick nor a correction"] += 1
        return
    rater, key = feedback.rater or ANONYMOUS, (feedback.response_id, feedback.choice)

    thumbs = {"thumb": feedback.thumb} if feedback.thumb else {}
    for name, value in feedback.metrics:
        rating = ratings.get(name)
        if rating is None or rating.level != "response" or not (thumb := rating.thumb(value)):
            passed["a number in the middle, or of no declared metric of answers"] += 1
        else:
            thumbs[f"number {name}"] = thumb
    for what, thumb in thumbs.items():
        side = {"better" if thumb == "up" else "worse": key}
        yield (what, rater, frozenset([key])), _judgement(thumb, rater, texts, **side)

    if feedback.corrected:
        told = _judgement("correction", rater, texts, worse=key)
        if told.prompt is not None:
            told = replace(told, better=texts[key][0].corrected(key[1], feedback.corrected))
        yield ("correction", rater, frozenset([key])), told

    picks = [(key, other) for other in feedback.preferred_over]
    if (ranking := feedback.ranking) is not None:
        ranks = ranking.ranks
        if not ranks:  # skipped: as if all were tied
            answer = texts.get((feedback.response_id, 0))
            ranks = (0,) * (0 if answer is None else len(answer[0].choices))
        for i, j in combinations(range(len(ranks)), 2):
            (first, a), (second, b) = sorted(((ranks[i], i), (ranks[j], j)))
            both = (feedback.response_id, a), (feedback.response_id, b)
            if first < second:
                picks.append(both)
            else:
                yield ("pick", rater, frozenset(both)), None
    for better, worse in picks:
        pick = _judgement("pick", rater, texts, better=better, worse=worse)
        if pick.prompt is not None:
            one, two = texts[better][0], texts[worse][0]
            if (one.prompt, one.tools) != (two.prompt, two.tools):
                passed["a pick between answers to different prompts"] += 1
                continue
        yield ("pick", rater, frozenset((better, worse))), pick


def _judgement(kind: str, rater: str, texts: "Texts", **sides: Choice) -> Judgement:
    """What a rater says about choices ("better", "worse"), with their texts if all are kept."""
    kept = [texts[key] for key in sides.values() if key in texts]
    judgement = Judgement(
        kind,
        rater,
        ids=tuple(dict.fromkeys(id for id, _ in sides.values())),
        talks=tuple(dict.fromkeys(a.conversation_id for a, _ in kept if a.conversation_id)),
    )
    if len(kept) < len(sides):
        return judgement
    answer = kept[0][0]
    messages: dict[str, Any] = {side: text for side, (_, text) in zip(sides, kept)}
    return replace(
        judgement, prompt=answer.prompt, tools=answer.tools, model=answer.model or None, **messages
    )


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


def _of_row(row: Any) -> Iterator[Judgement]:
    known = row if isinstance(row, dict) else {}
    given = {name: known[name] for name in RowFacts.__dataclass_fields__ if name in known}
    for name, value in given.items():
        if isinstance(value, str):
            check_unicode(value, name)
    facts = validate(given, RowFacts, "", extra="forbid")
    origin = facts.provenance or RowProvenance()

    def judgement(kind: str, **texts: Any) -> Judgement:
        return Judgement(
            kind, facts.rater or ANONYMOUS, tuple(origin.responses), model=facts.model,
            licence=facts.licence, talks=tuple(origin.conversations), **texts,
        )  # fmt: skip

    if "messages" in known and "label" not in known and "kto_tag" not in known:
        talk = conversation_of(row)
        prompt, answer = talk.messages[:-1], talk.messages[-1:]
        yield judgement("up", prompt=prompt, better=answer, tools=talk.tools)
        return
    found = preference_of(row)
    if isinstance(found, Label):
        side, kind = ("better", "up") if found.desirable else ("worse", "down")
        yield judgement(kind, prompt=found.prompt, tools=found.tools, **{side: found.answer})
        return
    for pair in found.pairs():
        better, worse = pair.answers
        kind = "correction" if pair.corrected else "pick"
        yield judgement(kind, prompt=pair.prompt, better=better, worse=worse, tools=pair.tools)
