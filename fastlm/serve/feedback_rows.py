"""Rows of a feedback database: what they stand for as rows, without personal data in any text; and
rows as what they stand for, checked by the dataclasses that they become. SQLite stores any value in
any column, and the file may be a stranger's.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TypeVar

from fastlm.data.conversations import messages_of
from fastlm.data.scrub_chat import scrub_chat
from fastlm.errors import InputError, check_unicode, show
from fastlm.files import parse_json
from fastlm.schema import Finite, validate
from fastlm.serve.ratings import Rating
from fastlm.serve.responses import Feedback, StoredResponse
from fastlm.serve.tables import ANSWERS, FEEDBACK, RATINGS

T = TypeVar("T")
SKIPPED = "{}"  # the column of a ranking that says that the rater skipped the answer


def answer_row(answer: StoredResponse) -> dict[str, Any]:
    """The row of an answer, without personal data."""
    return {
        "response_id": answer.response_id,
        "conversation_id": answer.conversation_id,
        "model": answer.model,
        "prompt": as_json(scrubbed(answer.prompt)),
        "tools": None if answer.tools is None else as_json(scrubbed(answer.tools)),
        "choices": as_json(scrubbed(answer.choices)),
        "num_choices": len(answer.choices),
        "created_at": _now(),
    }


def opinion_row(opinion: Feedback) -> dict[str, Any]:
    """The row of an opinion, without personal data."""
    over, ranking = opinion.preferred_over, opinion.ranking
    return {
        "response_id": opinion.response_id,
        "conversation_id": opinion.conversation_id,
        "choice": opinion.choice,
        "rater": scrubbed(opinion.rater),
        "thumb": opinion.thumb,
        "comment": scrubbed(opinion.comment),
        "corrected": scrubbed(opinion.corrected),
        "preferred_over": as_json(over) if over else None,
        "ranking": None
        if ranking is None
        else as_json({key: x for key, x in asdict(ranking).items() if x not in (None, ())}),
        "metrics": as_json(dict(opinion.metrics)) if opinion.metrics else None,
        "created_at": _now(),
    }


def scrubbed(value: Any, replaced: Counter[str] | None = None) -> Any:
    """``value`` without personal data in any of its texts. ``replaced`` counts it by kind."""
    if isinstance(value, str):
        text, counts = scrub_chat(value.replace("\0", ""))  # which PostgreSQL does not store
        if replaced is not None:
            replaced.update(counts)
        return text
    if isinstance(value, Mapping):
        return {key: scrubbed(item, replaced) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [scrubbed(item, replaced) for item in value]
    return value


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_answer(row: Any, name: str) -> StoredResponse:
    """A row of `ANSWERS` in the database ``name``. InputError names row and column."""
    where = f"{name}: {ANSWERS.name} {row.response_id!r:.140}: "
    values = {
        "response_id": row.response_id,
        "model": row.model,
        "prompt": _json(row.prompt, f"{where}prompt"),
        "choices": _json(row.choices, f"{where}choices"),
        "tools": _json(row.tools, f"{where}tools"),
        "conversation_id": row.conversation_id,
    }
    answer = validate(_values(values), StoredResponse, where.removesuffix(": "), extra="forbid")
    prompt = [message for _, message in messages_of(answer.prompt, f"{where}prompt")]
    choices = [
        [message for _, message in messages_of(choice, f"{where}choices[{i}]")]
        for i, choice in enumerate(answer.choices)
    ]
    return StoredResponse(
        answer.response_id, answer.model, prompt, choices, answer.tools, answer.conversation_id
    )


def read_opinion(row: Any, name: str) -> Feedback:
    """A row of `FEEDBACK`. InputError names row and column."""
    where = f"{name}: {FEEDBACK.name} {row.id!r:.40}: "
    values = {
        key: getattr(row, key)
        for key in ("response_id", "conversation_id", "choice", "rater", "thumb", "comment",
                    "corrected")
    }  # fmt: skip
    values["preferred_over"] = _json(row.preferred_over, f"{where}preferred_over") or []
    if row.ranking is not None:
        values["ranking"] = _json(row.ranking, f"{where}ranking")
    values["metrics"] = [list(item) for item in read_metrics(row.metrics, where).items()]
    return validate(_values(values), Feedback, where.removesuffix(": "), extra="forbid")


def read_metrics(text: Any, where: str) -> dict[str, float]:
    """The numbers that an opinion gives, by name."""
    return validate(_json(text, f"{where}metrics") or {}, dict[str, Finite], f"{where}metrics.")


def read_rating(row: Any, name: str) -> Rating:
    """A row of `RATINGS`."""
    where = f"{name}: {RATINGS.name} {row.name!r:.80}: "
    return validate(_values(row._mapping), Rating, where.removesuffix(": "), extra="forbid")


def read_time(value: Any, where: str) -> float:
    """Seconds since 1970 of a column with a time in ISO 8601."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: expected a time as ISO 8601, got {value!r:.80}") from None


def readable(read: Callable[[Any, str], T], rows: Iterable[Any], name: str) -> Iterator[T]:
    """What can be read of some rows. For deletion alone: no export takes a row that cannot."""
    for row in rows:
        with suppress(InputError):
            yield read(row, name)


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _value(value) for key, value in row.items()}


def _value(value: Any) -> Any:
    """A value of a column; bytes, which nothing here has, as an object that no schema fits."""
    return {"bytes": show(value)} if isinstance(value, bytes) else value


def _json(text: Any, where: str) -> Any:
    if text is None:
        return None
    value = parse_json(validate(_value(text), str, where), where)
    if "\\u" in text:
        _check(value, where)
    return value


def _check(value: Any, where: str) -> None:
    """InputError for a lone surrogate, which only an escape can write."""
    if isinstance(value, str):
        check_unicode(value, where)
    elif isinstance(value, list):
        for item in value:
            _check(item, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_unicode(key, where)
            _check(item, where)
