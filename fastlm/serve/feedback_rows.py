"""Rows of a feedback database: what they stand for as rows, without personal data in any text; and
rows as what they stand for, checked by the dataclasses that they become. SQLite stores any value in
any column, and the file may be a stranger's.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from typing import Any

from fastlm.data.conversations import Message, parse_messages
from fastlm.data.scrub_chat import scrub_chat
from fastlm.errors import InputError, show
from fastlm.schema import Finite, parse, validate
from fastlm.serve.feedback import Feedback, StoredResponse
from fastlm.serve.ratings import Rating
from fastlm.serve.tables import ANSWERS, FEEDBACK, RATINGS

Anything: Any = Any  # as a schema
SKIPPED = "{}"  # the column of a ranking that says that the rater skipped the answer
JSON_COLUMNS = {"prompt", "tools", "choices", "preferred_over", "ranking", "metrics"}
USER_TEXTS = {"prompt", "tools", "choices", "rater", "comment", "corrected"}


def row_of(value: StoredResponse | Feedback) -> dict[str, Any]:
    """Return the row of an answer or of feedback, without personal data."""
    row: dict[str, Any] = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, StoredResponse):
        row["num_choices"] = len(value.choices)
    else:
        row |= {"preferred_over": value.preferred_over or None, "metrics": dict(value.metrics)}
        row["metrics"] = row["metrics"] or None
        if value.ranking is not None:
            row["ranking"] = {k: v for k, v in asdict(value.ranking).items() if v not in (None, ())}
    for name, item in row.items():
        item = scrubbed(item) if name in USER_TEXTS else item
        row[name] = item if item is None or name not in JSON_COLUMNS else as_json(item)
    return row | {"created_at": now()}


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


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_response(row: Any, name: str) -> StoredResponse:
    """A row of `ANSWERS` in the database ``name``. InputError names row and column."""
    where = f"{name}: {ANSWERS.name} {row.response_id!r:.140}: "

    def checked(messages: Any, column: str) -> list[Message]:
        return [message for _, message in parse_messages(messages, where + column)]

    answer = _read(row, StoredResponse, where)
    choices = [checked(choice, f"choices[{i}]") for i, choice in enumerate(answer.choices)]
    return replace(answer, prompt=checked(answer.prompt, "prompt"), choices=choices)


def read_feedback(row: Any, name: str) -> Feedback:
    """A row of `FEEDBACK`. InputError names row and column."""
    where = f"{name}: {FEEDBACK.name} {row.id!r:.40}: "
    metrics = [list(item) for item in read_metrics(row.metrics, where).items()]
    return _read(row, Feedback, where, metrics=metrics)


def read_metrics(text: Any, where: str) -> dict[str, float]:
    """Return the numbers that feedback gives, by name."""
    given = _loaded(text, f"{where}metrics")
    return validate(given or {}, dict[str, Finite], f"{where}metrics.")


def read_rating(row: Any, name: str) -> Rating:
    """A row of `RATINGS`."""
    return _read(row, Rating, f"{name}: {RATINGS.name} {row.name!r:.80}: ")


def read_time(value: Any, where: str) -> float:
    """Seconds since 1970 of a column with a time in ISO 8601."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: expected a time as ISO 8601, got {value!r:.80}") from None


def _read(row: Any, schema: Any, where: str, **known: Any) -> Any:
    """A row as a dataclass, whose fields have the names of its columns."""
    values = {}
    for name in (field.name for field in fields(schema)):
        value = known[name] if name in known else getattr(row, name)
        if name in JSON_COLUMNS and name not in known:
            value = _loaded(value, where + name)
            if value is None and name == "preferred_over":
                value = []
        # bytes, which nothing here has: as an object, which no schema takes
        values[name] = {"bytes": show(value)} if isinstance(value, bytes) else value
    return validate(values, schema, where.removesuffix(": "), extra="forbid")


def _loaded(text: Any, where: str) -> Any:
    """The value of a column of JSON."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a string, got {show(text):.80}")
    return parse(text, Anything, where)
