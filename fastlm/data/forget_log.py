"""Keep a log of what was forgotten, as hashes: keys of documents, texts, responses and
conversations.

``forget_log.jsonl`` in a folder of runs, in a run or in a prepared folder has a line per request:
``{"time", "request_keys", "keys", "content_ids", "signatures"}``. request_keys: hashes of the
targets as they were given. keys: hashes of what was found; data that is prepared later leaves these
out. content_ids: ids of the files that contained it, by which the models that saw it are found
later, too. signatures: of texts whose near copies are also forgotten
(`fastlm.data.near_copies.signature_of`). The log has no text and no name. (Somebody who has a short
text can still find out whether its hash is in the log.)
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.data.conversations import Message, message_contents, parse_conversation
from fastlm.data.dedup import content_key
from fastlm.data.preferences import Comparison, parse_preference
from fastlm.errors import InputError
from fastlm.files import reason
from fastlm.schema import parse

FORGET_LOG = "forget_log.jsonl"
PROVENANCE = "provenance"  # key of a row: {"responses": [id, ...], "conversations": [id, ...]}


@dataclass
class ForgetRecord:
    """One line of the log."""

    time: str
    request_keys: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    content_ids: list[str] = field(default_factory=list)
    signatures: list[str] = field(default_factory=list)


def request_key(target: str) -> str:
    """Return the hash of a target as the user wrote it."""
    return _hash("request", target)


def document_key(source: str, id: str) -> str:
    """Return the key of a document by source and id, without the numbers of its parts
    (``a.txt:0:3``)."""
    return _hash("document", [source, document_id(id)])


def document_id(id: str) -> str:
    """Return the id of the document that a part belongs to."""
    before, colon, number = id.rpartition(":")
    return document_id(before) if colon and number.isdigit() and before else id


def line_key(source: str, id: str) -> str:
    """Return the key of one line of a file of documents, or of one part."""
    return _hash("line", [source, id])


def text_key(text: str) -> str:
    """Return the key of a text; case and white space do not count
    (`fastlm.data.dedup.content_key`)."""
    return f"text:{content_key(text).hex()}"


def response_key(id: str) -> str:
    """Return the key of a response by its id."""
    return _hash("response", id)


def conversation_key(id: str) -> str:
    """Return the key of a conversation by its id."""
    return _hash("conversation", id)


def messages_key(messages: Sequence[Message]) -> str:
    """Return the key of a conversation by the text of its messages."""
    return _hash("messages", message_contents(messages))


def _hash(kind: str, value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return f"{kind}:{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()}"


def row_keys(row: Any) -> set[str]:
    """Return the keys of a row to train on: those of the responses in its provenance, else those of
    its messages. A row with neither has none.
    """
    if not isinstance(row, Mapping):
        return set()
    provenance = row.get(PROVENANCE)
    if isinstance(provenance, Mapping):
        return provenance_keys(provenance.get("responses"), provenance.get("conversations"))
    try:
        return {messages_key(parse_conversation(row).messages)}
    except InputError:
        pass
    try:
        example = parse_preference(row)
    except InputError:
        return set()
    answers = example.answers if isinstance(example, Comparison) else (example.answer,)
    return {messages_key([*example.prompt, *answer]) for answer in answers}


def provenance_keys(responses: Any, conversations: Any) -> set[str]:
    """Return the keys of the ids of responses and conversations."""
    keys = {response_key(id) for id in responses or () if isinstance(id, str)}
    return keys | {conversation_key(id) for id in conversations or () if isinstance(id, str)}


def read_forget_log(folder: Path) -> list[ForgetRecord]:
    """Return the records of the log in ``folder``, [] if it has none. A line that was cut off is
    skipped. InputError: another file.
    """
    path = folder / FORGET_LOG
    if not path.is_file():
        return []
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    lines, records = text.split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records.append(parse(line, ForgetRecord, "it", extra="forbid"))
        except InputError as error:
            if line.endswith("}"):  # complete, and not written by this module
                raise InputError(f"{path}, line {number}: {error}") from None
    return records


def forgotten_keys(folders: Iterable[Path]) -> frozenset[str]:
    """Return the keys and signatures of everything that was forgotten in these folders."""
    records = [record for folder in folders for record in read_forget_log(folder)]
    return frozenset(key for record in records for key in (*record.keys, *record.signatures))


def document_names(source: str, id: str, meta: Mapping[str, Any]) -> Iterator[str]:
    """Yield all names by which a document can be a target: its id and that of the document that it
    is a part of, its URL, its source, its path.
    """
    document = document_id(id)
    yield from (id, document, source)
    if isinstance(url := meta.get("url"), str) and url:
        yield url
    yield f"{source.rstrip('/')}/{document}"
    local = Path(source)
    yield str((local if local.name == document else local / document).absolute())
