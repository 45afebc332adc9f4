"""What was forgotten, as hashes: keys of documents, texts, responses and conversations, and the log
of them beside the data.

``forgotten.jsonl`` in a folder of runs, in a run or in a prepared folder has a line per request:
``{"at", "asked", "keys", "held"}``. asked: hashes of what was asked for. keys: of what was found,
which data that is prepared again leaves out. held: content ids of what held it, by which the models
that saw it are found later, too. It has no text and no name. (Who has a short text can still find
out whether its hash is there.)
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.data.conversations import Message, conversation_of, said
from fastlm.data.dedup import content_key
from fastlm.data.preferences import Comparison, preference_of
from fastlm.errors import InputError
from fastlm.files import reason
from fastlm.schema import parse

FORGOTTEN = "forgotten.jsonl"
PROVENANCE = "provenance"  # key of a row: {"responses": [id, ...], "conversations": [id, ...]}


@dataclass
class Line:
    """One line of the log."""

    at: str
    asked: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)


def asked_key(what: str) -> str:
    """The hash of what somebody asked for, as he or she wrote it."""
    return _hash("asked", what)


def document_key(source: str, id: str) -> str:
    """The key of a document by its place, without the numbers of its parts (``a.txt:0:3``)."""
    return _hash("document", [source, whole_id(id)])


def whole_id(id: str) -> str:
    """The id of the document of which this is a part."""
    before, colon, number = id.rpartition(":")
    return whole_id(before) if colon and number.isdigit() and before else id


def line_key(source: str, id: str) -> str:
    """The key of one line of a file of documents, or of one part."""
    return _hash("line", [source, id])


def text_key(text: str) -> str:
    """The key of a text; case and white space do not count (`fastlm.data.dedup.content_key`)."""
    return f"text:{content_key(text).hex()}"


def response_key(id: str) -> str:
    return _hash("response", id)


def conversation_key(id: str) -> str:
    return _hash("conversation", id)


def talk_key(messages: Sequence[Message]) -> str:
    """The key of a conversation by what it says."""
    return _hash("talk", said(messages))


def _hash(kind: str, value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return f"{kind}:{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()}"


def keys_of_row(row: Any) -> set[str]:
    """The keys of a row to train on: of the responses that it names as its provenance, else of
    what its conversations say. A row of neither kind has none.
    """
    if not isinstance(row, Mapping):
        return set()
    given = row.get(PROVENANCE)
    if isinstance(given, Mapping):
        return provenance_keys(given.get("responses"), given.get("conversations"))
    try:
        return {talk_key(conversation_of(row).messages)}
    except InputError:
        pass
    try:
        example = preference_of(row)
    except InputError:
        return set()
    answers = example.answers if isinstance(example, Comparison) else (example.answer,)
    return {talk_key([*example.prompt, *answer]) for answer in answers}


def provenance_keys(responses: Any, conversations: Any) -> set[str]:
    found = {response_key(id) for id in responses or () if isinstance(id, str)}
    return found | {conversation_key(id) for id in conversations or () if isinstance(id, str)}


def read_log(folder: Path) -> list[Line]:
    """The lines of the log in ``folder``, [] if it has none. A line that was cut off does not
    count. InputError: another file.
    """
    path = folder / FORGOTTEN
    if not path.is_file():
        return []
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    lines, found = text.split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(parse(line, Line, "it", extra="forbid"))
        except InputError as error:
            if line.endswith("}"):  # whole, and no line of ours
                raise InputError(f"{path}, line {number}: {error}") from None
    return found


def forgotten_keys(folders: Iterable[Path]) -> frozenset[str]:
    """The keys of all that was forgotten in these folders."""
    return frozenset(key for folder in folders for line in read_log(folder) for key in line.keys)


def names_of(source: str, id: str, meta: Mapping[str, Any]) -> Iterator[str]:
    """Everything by which somebody may ask for a document: its id and that of the whole, its URL,
    its source, its path.
    """
    whole = whole_id(id)
    yield from (id, whole, source)
    if isinstance(url := meta.get("url"), str) and url:
        yield url
    yield f"{source.rstrip('/')}/{whole}"
    local = Path(source)
    yield str((local if local.name == whole else local / whole).absolute())
