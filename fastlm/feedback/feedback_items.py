"""Read feedback about answers, one item at a time, from feedback databases and files of rows.

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

from fastlm.data.conversations import Message, message_contents, parse_conversation, read_examples
from fastlm.data.dedup import content_key
from fastlm.data.forget_log import conversation_key, messages_key, response_key
from fastlm.data.preferences import UnpairedPreference, parse_preference
from fastlm.errors import check_unicode
from fastlm.schema import validate
from fastlm.serve.commands import open_store
from fastlm.serve.feedback import latest

if TYPE_CHECKING:
    from fastlm.serve.feedback import Feedback, StoredResponse
    from fastlm.serve.ratings import Rating

    Choices = dict["ChoiceId", tuple[StoredResponse, list[Message]]]  # with consent

EXPORTS = (".jsonl", ".ndjson")
ANONYMOUS = ""  # the name of all raters who give none; together they count as one
ChoiceId = tuple[str, int]  # (id of the response, index of the choice)
Statement = tuple[str, str, frozenset[ChoiceId]]  # (kind, rater, choices)


@dataclass(frozen=True)
class FeedbackItem:
    """One piece of feedback by one rater. ``kind``:

    - "pick": ``better`` and ``worse`` answer the same prompt;
    - "correction": ``better`` is what the rater wrote to replace ``worse``;
    - "up": ``better`` is good; "down": ``worse`` is bad (a thumb, or a number in the better or the
      worse half of its range).

    response_ids, conversation_ids: the responses that it is about, and their conversations. model:
    the model that wrote them. licence: the row's, if it states one. ``prompt`` is None without
    consent to store the text.
    """

    kind: str
    rater: str
    response_ids: tuple[str, ...]
    prompt: list[Message] | None = None
    better: list[Message] | None = None
    worse: list[Message] | None = None
    tools: list[Any] | None = None
    model: str | None = None
    licence: str | None = None
    source: str = ""
    conversation_ids: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """All its texts."""
        messages = [*(self.prompt or ()), *(self.better or ()), *(self.worse or ())]
        return [m["content"] for m in messages if isinstance(m.get("content"), str)]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return sum(len(text.encode("utf-8", "replace")) for text in self.texts)

    @property
    def prompt_key(self) -> bytes:
        """A hash that is equal for prompts with the same text, whatever their case and white
        space."""
        return _key([message_contents(self.prompt or []), self.tools])

    @property
    def opening_key(self) -> bytes:
        """A hash that is equal for prompts with the same first user message. Rows of later turns
        have the first message, too.
        """
        questions = [m for m in self.prompt or () if m.get("role") == "user"]
        return _key(message_contents((questions or self.prompt or [])[:1]))

    @property
    def key(self) -> bytes:
        """A hash that is equal for items that say the same about the same answers."""
        answers = [message_contents(self.better or []), message_contents(self.worse or [])]
        return self.prompt_key + _key([self.kind, *answers])

    def forget_keys(self) -> Iterator[str]:
        """Yield the keys by which it is left out after a withdrawal (`fastlm.data.forget_log`)."""
        yield from map(response_key, self.response_ids)
        yield from map(conversation_key, self.conversation_ids)
        for answer in (self.better, self.worse):
            if answer is not None:
                yield messages_key([*(self.prompt or ()), *answer])

    def vote(self) -> tuple[bytes, str, bool]:
        """Return (item, rater, yes or no), so that votes of several raters can be compared.

        A pick votes on which of two answers is better, a thumb on whether one is good; a correction
        votes that the answer is not good.
        """
        better, worse = (
            _key(message_contents(self.better or [])),
            _key(message_contents(self.worse or [])),
        )
        if self.kind == "pick":
            first, second = sorted((better, worse))
            return b"pair" + self.prompt_key + first + second, self.rater, better == first
        up = self.kind == "up"
        return b"good" + self.prompt_key + (better if up else worse), self.rater, up


def _key(value: Any) -> bytes:
    return content_key(json.dumps(value, ensure_ascii=False, sort_keys=True))


def read_feedback_items(
    sources: Sequence[str], cache: Path, skipped: Counter[str]
) -> list[FeedbackItem]:
    """Return the feedback items of all sources: paths or URLs of feedback databases, and .jsonl
    files of rows to train on.

    ``skipped`` counts the feedback that becomes no item, by reason.

    InputError: a database that is missing or cannot be used; a line that is no row to train on.
    """
    items: list[FeedbackItem] = []
    for source in sources:
        if is_export(source):
            for rows in read_examples([source], lambda row, _: [*_items_of_row(row)], cache=cache):
                items += [replace(item, source=source) for item in rows]
        else:
            items += _read_database(source, skipped)
    return items


def is_export(source: str) -> bool:
    """Return whether a source is a file of rows, not a database."""
    return "://" not in source and Path(source).suffix in EXPORTS


def _read_database(url: str, skipped: Counter[str]) -> list[FeedbackItem]:
    with open_store(url) as store:
        responses, feedback, name = store.responses(), store.all_feedback(), store.name
        ratings = {rating.name: rating for rating in store.ratings()}
    choices = {
        (id, index): (response, messages)
        for id, response in responses.items()
        for index, messages in enumerate(response.choices)
    }
    statements = [pair for row in feedback for pair in _items_of(row, choices, ratings, skipped)]
    last = latest(statements)
    items = [replace(item, source=name) for item in last.values() if item is not None]
    skipped["changed later by the same rater"] += len(statements) - len(last)
    skipped["ties and skipped rankings"] += len(last) - len(items)
    return items


def withdrawn_keys(source: str) -> frozenset[str]:
    """Return the keys of all that was deleted from a database; a file of rows has none."""
    if is_export(source):
        return frozenset()
    with open_store(source) as store:
        return store.withdrawn_keys()


def _items_of(
    feedback: "Feedback", choices: "Choices", ratings: "dict[str, Rating]", skipped: Counter[str]
) -> "Iterator[tuple[Statement, FeedbackItem | None]]":
    """Yield the items of a feedback row, by what they are about. None cancels what the rater said
    of these answers before."""
    if feedback.response_id is None:
        skipped["about a conversation, not an answer"] += 1
        return
    if feedback.kinds() in ([], ["comment"]):
        skipped["neither a thumb, a number, a pick nor a correction"] += 1
        return
    rater, key = feedback.rater or ANONYMOUS, (feedback.response_id, feedback.choice)

    thumbs = {"thumb": feedback.thumb} if feedback.thumb else {}
    for name, value in feedback.metrics:
        rating = ratings.get(name)
        if rating is None or rating.level != "response" or not (thumb := rating.thumb(value)):
            skipped["a number in the middle of its range, or of no declared metric of answers"] += 1
        else:
            thumbs[f"number {name}"] = thumb
    for kind, thumb in thumbs.items():
        side = {"better" if thumb == "up" else "worse": key}
        yield (kind, rater, frozenset([key])), _item(thumb, rater, choices, **side)

    if feedback.corrected:
        item = _item("correction", rater, choices, worse=key)
        if item.prompt is not None:
            better = choices[key][0].with_correction(key[1], feedback.corrected)
            item = replace(item, better=better)
        yield ("correction", rater, frozenset([key])), item

    picks = [(key, other) for other in feedback.preferred_over]
    if (ranking := feedback.ranking) is not None:
        ranks = ranking.ranks
        if not ranks:  # skipped: like a tie of all
            choice = choices.get((feedback.response_id, 0))
            ranks = (0,) * (0 if choice is None else len(choice[0].choices))
        for i, j in combinations(range(len(ranks)), 2):
            (first, a), (second, b) = sorted(((ranks[i], i), (ranks[j], j)))
            both = (feedback.response_id, a), (feedback.response_id, b)
            if first < second:
                picks.append(both)
            else:
                yield ("pick", rater, frozenset(both)), None
    for better, worse in picks:
        pick = _item("pick", rater, choices, better=better, worse=worse)
        if pick.prompt is not None:
            a, b = choices[better][0], choices[worse][0]
            if (a.prompt, a.tools) != (b.prompt, b.tools):
                skipped["a pick between answers to different prompts"] += 1
                continue
        yield ("pick", rater, frozenset((better, worse))), pick


def _item(kind: str, rater: str, choices: "Choices", **sides: ChoiceId) -> FeedbackItem:
    """Return an item about choices ("better", "worse"), with their texts if all are stored."""
    stored = [choices[key] for key in sides.values() if key in choices]
    item = FeedbackItem(
        kind,
        rater,
        response_ids=tuple(dict.fromkeys(id for id, _ in sides.values())),
        conversation_ids=tuple(
            dict.fromkeys(r.conversation_id for r, _ in stored if r.conversation_id)
        ),
    )
    if len(stored) < len(sides):
        return item
    response = stored[0][0]
    messages: dict[str, Any] = {side: text for side, (_, text) in zip(sides, stored)}
    return replace(
        item, prompt=response.prompt, tools=response.tools, model=response.model or None, **messages
    )


@dataclass(frozen=True)
class RowProvenance:
    """The ids of the responses and conversations that a row comes from."""

    responses: list[str] = field(default_factory=list)
    conversations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RowMetadata:
    """The fields of a row besides its texts."""

    rater: str | None = None
    model: str | None = None
    licence: str | None = None
    provenance: RowProvenance | None = None


def _items_of_row(row: Any) -> Iterator[FeedbackItem]:
    fields = row if isinstance(row, dict) else {}
    values = {name: fields[name] for name in RowMetadata.__dataclass_fields__ if name in fields}
    for name, value in values.items():
        if isinstance(value, str):
            check_unicode(value, name)
    metadata = validate(values, RowMetadata, "", extra="forbid")
    origin = metadata.provenance or RowProvenance()

    def item(kind: str, **texts: Any) -> FeedbackItem:
        return FeedbackItem(
            kind, metadata.rater or ANONYMOUS, tuple(origin.responses), model=metadata.model,
            licence=metadata.licence, conversation_ids=tuple(origin.conversations), **texts,
        )  # fmt: skip

    if "messages" in fields and "label" not in fields and "kto_tag" not in fields:
        conversation = parse_conversation(row)
        prompt, answer = conversation.messages[:-1], conversation.messages[-1:]
        yield item("up", prompt=prompt, better=answer, tools=conversation.tools)
        return
    preference = parse_preference(row)
    if isinstance(preference, UnpairedPreference):
        side, kind = ("better", "up") if preference.desirable else ("worse", "down")
        texts = {side: preference.answer}
        yield item(kind, prompt=preference.prompt, tools=preference.tools, **texts)
        return
    for pair in preference.pairs():
        better, worse = pair.answers
        kind = "correction" if pair.corrected else "pick"
        yield item(kind, prompt=pair.prompt, better=better, worse=worse, tools=pair.tools)
