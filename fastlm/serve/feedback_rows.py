"""Convert feedback and responses to rows of the database, and back.

Rows have no personal data in any text. When rows are read, the dataclasses check them, since SQLite
stores any value in any column, and the file may come from a stranger.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from typing import Any

from fastlm.data import personal
from fastlm.data.conversations import Message, parse_messages
from fastlm.errors import InputError, show
from fastlm.schema import Finite, parse, validate
from fastlm.serve.feedback import Feedback, StoredResponse
from fastlm.serve.ratings import Rating
from fastlm.serve.tables import FEEDBACK, RATINGS, RESPONSES

ANY: Any = Any  # as a schema
SKIPPED = "{}"  # the column of a ranking that the rater skipped
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
    prompt = personal.Placeholders()  # <EMAIL_1> in an answer is that of its prompt
    for name, item in row.items():
        if name == "prompt":
            item = scrubbed(item, placeholders=prompt)
        elif name == "choices":
            item = [scrubbed(choice, placeholders=prompt.copy()) for choice in item]
        elif name in USER_TEXTS:
            item = scrubbed(item)
        row[name] = item if item is None or name not in JSON_COLUMNS else as_json(item)
    return row | {"created_at": now()}


def scrubbed(
    value: Any,
    replaced: Counter[str] | None = None,
    placeholders: personal.Placeholders | None = None,
) -> Any:
    """Return ``value`` without personal data in its texts. ``replaced`` counts it by kind.

    ``placeholders`` numbers the same value alike in all texts that share it; by default those of
    ``value``. Telephone numbers of all countries are found: a miss costs more than a false one.
    """
    numbers = personal.Placeholders() if placeholders is None else placeholders
    if isinstance(value, str):
        # \0: which PostgreSQL does not store
        text, counts = personal.replace(value.replace("\0", ""), regions=None, placeholders=numbers)
        if replaced is not None:
            replaced.update(counts)
        return text
    if isinstance(value, Mapping):
        return {key: scrubbed(item, replaced, numbers) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [scrubbed(item, replaced, numbers) for item in value]
    return value


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_response(row: Any, name: str) -> StoredResponse:
    """Read a row of `RESPONSES` in the database ``name``. InputError names row and column."""
    prefix = f"{name}: {RESPONSES.name} {row.response_id!r:.140}: "

    def check_messages(messages: Any, column: str) -> list[Message]:
        return [message for _, message in parse_messages(messages, prefix + column)]

    response = _read(row, StoredResponse, prefix)
    choices = [check_messages(c, f"choices[{i}]") for i, c in enumerate(response.choices)]
    return replace(response, prompt=check_messages(response.prompt, "prompt"), choices=choices)


def read_feedback(row: Any, name: str) -> Feedback:
    """Read a row of `FEEDBACK`. InputError names row and column."""
    prefix = f"{name}: {FEEDBACK.name} {row.id!r:.40}: "
    metrics = [list(item) for item in read_metrics(row.metrics, prefix).items()]
    return _read(row, Feedback, prefix, metrics=metrics)


def read_metrics(text: Any, prefix: str) -> dict[str, float]:
    """Return the numbers that feedback gives, by name."""
    values = _load_json(text, f"{prefix}metrics")
    return validate(values or {}, dict[str, Finite], f"{prefix}metrics.")


def read_rating(row: Any, name: str) -> Rating:
    """Read a row of `RATINGS`."""
    return _read(row, Rating, f"{name}: {RATINGS.name} {row.name!r:.80}: ")


def read_time(value: Any, column: str) -> float:
    """Return the seconds since 1970 of a time in ISO 8601."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{column}: expected a time as ISO 8601, got {value!r:.80}") from None


def _read(row: Any, schema: Any, prefix: str, **parsed: Any) -> Any:
    """Read a row as a dataclass with the same names. ``parsed``: values of columns that were parsed
    already."""
    values = {}
    for name in (field.name for field in fields(schema)):
        value = parsed[name] if name in parsed else getattr(row, name)
        if name in JSON_COLUMNS and name not in parsed:
            value = _load_json(value, prefix + name)
            if value is None and name == "preferred_over":
                value = []
        # no column has bytes: an object is refused by every schema
        values[name] = {"bytes": show(value)} if isinstance(value, bytes) else value
    return validate(values, schema, prefix.removesuffix(": "), extra="forbid")


def _load_json(text: Any, column: str) -> Any:
    """Return the value of a JSON column."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise InputError(f"{column}: expected a string, got {show(text):.80}")
    return parse(text, ANY, column)
