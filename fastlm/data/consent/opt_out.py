"""Lists of documents that are to be left out: by domain, address, repository, author or hash.

A text file has an entry per line, a kind before it or not:

    # asked for on 2026-05-01
    domain: example.com               with its subdomains
    url: https://site.example/blog/   what begins so
    repository: github.com/owner/name
    author: Jane Doe
    hash: 6f1c...                     sha256 of the text, or of `fastlm data forget`
    example.org                       without a kind: a domain, an address if it has a "/", a hash

A TOML file has lists (``domains = ["example.com"]``, ``urls``, ``repositories``, ``authors``,
``hashes``). A JSON Lines file has objects (``{"domain": "example.com"}``). Each may be compressed
by gzip or zstd. A line that is no entry is counted, named and skipped (`OptOut.problems`).

An entry is a key of a dictionary, so a document takes a few microseconds whatever the length of the
list. A prefix ends at a boundary of the address: ``https://x.example/user1`` does not cover
``https://x.example/user10``.

Rejected: a Bloom filter; it could not name the entry.
"""

import hashlib
import io
import json
import re
from array import array
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlm.data.forget_log import text_key
from fastlm.errors import InputError
from fastlm.files import reason
from fastlm.schema import parse_toml
from fastlm.sources.streams import open_stream

KINDS = ("domain", "url", "repository", "author", "hash")
MAX_LINE = 8192  # characters of an entry
MAX_TOML = 1 << 26  # a long list belongs into a text file
MAX_PROBLEMS = 100  # that are named; all are counted

_PLURALS = {"repository": "repositories", "hash": "hashes"}
_KIND = re.compile(r"(domain|url|repository|author|hash)\s*(?::|\s)\s*(.+)", re.IGNORECASE)
_HASH = re.compile(r"(?:(?:sha256|text):)?([0-9a-f]{32}|[0-9a-f]{64})", re.IGNORECASE)
_DOMAIN = re.compile(r"(?:\*?\.)?[^\s/:@?#]+\.[^\s/:@?#.]+\.?")
_SCHEME = re.compile(r"<?[a-z][a-z0-9+.-]*://(?:[^/?#@]*@)?", re.IGNORECASE)
_PORT = re.compile(r":(?:80|443)$")
_BOUNDARY = re.compile(r"[/?#&=]")


class OptOut:
    """Entries of one or several lists."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.problem_count = 0
        self._sources: list[str] = []
        self._entries: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
        self._lengths: list[int] = []  # of the prefixes of addresses
        # line and source of each entry: two numbers instead of a tuple of 56 bytes
        self._lines, self._files = array("q"), array("i")

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    @classmethod
    def load(cls, *paths: str | Path) -> "OptOut":
        """Read lists. InputError: a file that cannot be read, that has no entry but lines that are
        none, or a TOML file that is not one.
        """
        lists = cls()
        for path in paths:
            before = len(lists), lists.problem_count
            try:
                lists._read(Path(path))
            except (OSError, EOFError) as error:
                raise InputError(f"{path}: expected a list, got: {reason(error)}") from error
            if len(lists) == before[0] and lists.problem_count > before[1]:
                raise InputError(
                    f"{path}: expected entries such as domain: x.org, got {lists.problems[-1]}"
                )
        return lists

    def _read(self, path: Path) -> None:
        name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
        with _open(path) as lines:
            if name.endswith(".toml"):
                self._add_toml("".join(_bounded(lines)), str(path))
            elif name.endswith((".jsonl", ".ndjson")):
                self._add_lines(lines, str(path), _json_entries)
            else:
                self._add_lines(lines, str(path), _text_entries)

    @classmethod
    def of_lines(cls, lines: Iterable[str], source: str = "opt-out") -> "OptOut":
        """Return the entries of the lines of a text file."""
        lists = cls()
        lists._add_lines(lines, source, _text_entries)
        return lists

    def _add_lines(self, lines: Iterable[str], source: str, entries: Any) -> None:
        self._sources.append(source)
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            try:
                if len(line) > MAX_LINE:
                    raise ValueError(f"more than {MAX_LINE:,} characters")
                for kind, value in entries(line):
                    self._add(kind, value, number)
            except (ValueError, RecursionError) as error:
                self._problem(f"{source}, line {number}: {error}")

    def _add_toml(self, text: str, source: str) -> None:
        self._sources.append(source)
        table = parse_toml(text, source)
        kinds = {_PLURALS.get(kind, f"{kind}s"): kind for kind in KINDS}
        for key, values in table.items():
            if key not in kinds or not isinstance(values, list):
                self._problem(f"{source}: {key}: expected one of {', '.join(kinds)} with a list")
                continue
            for value in values:
                line = text.count("\n", 0, max(text.find(f'"{value}"'), 0)) + 1
                try:
                    self._add(kinds[key], value, line)
                except ValueError as error:
                    self._problem(f"{source}, line {line}: {error}")

    def _add(self, kind: str, value: Any, line: int) -> None:
        key = _NORMAL[kind](value) if isinstance(value, str) else ""
        if not key:
            raise ValueError(f"expected a {kind}, got {str(value)[:100]!r}")
        entries = self._entries[kind]
        if key not in entries:
            entries[key] = len(self._lines)
            self._lines.append(line)
            self._files.append(len(self._sources) - 1)
            if kind == "url" and len(key) not in self._lengths:
                insort(self._lengths, len(key))

    def _problem(self, text: str) -> None:
        self.problem_count += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)

    def match(self, document: Mapping[str, Any], text: str | None = None) -> str | None:
        """Return the entry that covers a document, with its place ("out.txt, line 3: domain
        x.org"), None for none.

        document: its metadata; ``url``, ``repository``, ``author`` or ``authors`` (a text or a
        list), ``sha256`` or ``hash`` are looked at. text: for the entries by hash.
        """
        for kind, key in self._keys(document, text):
            index = self._entries[kind].get(key)
            if index is not None:
                source = self._sources[self._files[index]]
                return f"{source}, line {self._lines[index]}: {kind} {key}"
        return None

    def _keys(self, document: Mapping[str, Any], text: str | None) -> Iterator[tuple[str, str]]:
        """Yield the keys under which entries that cover a document are stored."""
        url = document.get("url")
        if isinstance(url, str) and url:
            address = _address(url)
            host = _PORT.sub("", re.split("[/?#]", address, maxsplit=1)[0])
            if self._entries["domain"]:
                labels = host.rstrip(".").split(".")[-128:]  # a name has at most 127
                for i in range(len(labels)):
                    yield "domain", ".".join(labels[i:])
            for length in self._lengths:
                if length > len(address):
                    break
                if length == len(address) or _is_boundary(address, length):
                    yield "url", address[:length]
            if self._entries["repository"]:
                yield "repository", _repository(url)
        repository = document.get("repository")
        if isinstance(repository, str):
            yield "repository", _repository(repository)
        if self._entries["author"]:
            for key in ("author", "authors"):
                values = document.get(key) or ()
                for value in [values] if isinstance(values, str) else values:
                    yield "author", _author(str(value))
        if self._entries["hash"]:
            for key in ("sha256", "hash"):
                if isinstance(value := document.get(key), str):
                    yield "hash", _hash(value)
            if text is not None:
                data = text.encode("utf-8", "surrogatepass")
                yield "hash", hashlib.sha256(data).hexdigest()
                yield "hash", _hash(text_key(text))


def _is_boundary(address: str, length: int) -> bool:
    return bool(_BOUNDARY.match(address[length]) or _BOUNDARY.match(address[length - 1]))


def _address(url: str) -> str:
    """Return an address without scheme, user and default port; the host in small letters."""
    text = _SCHEME.sub("", url.strip()[:MAX_LINE], count=1).removesuffix(">")
    end = min((i for i in map(text.find, "/?#") if i >= 0), default=len(text))
    return _PORT.sub("", text[:end].lower()) + text[end:]


def _prefix(url: str) -> str:
    address = _address(url)
    return address if "." in address.partition("/")[0] or ":" in address else ""


def _domain(name: str) -> str:
    name = name.strip().lower()
    if not _DOMAIN.fullmatch(name):
        return ""
    name = name.removeprefix("*").strip(".")
    try:
        return name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return ""


def _repository(name: str) -> str:
    """Return ``github.com/owner/name`` of any address in it; the host may be missing."""
    text = name.strip()
    if text.startswith("git@"):
        text = text[4:].replace(":", "/", 1)
    parts = [part for part in re.split("[?#]", _address(text))[0].split("/") if part]
    if len(parts) == 2 and "." not in parts[0]:
        parts = ["github.com", *parts]
    if len(parts) < 3:
        return ""
    return "/".join(parts[:3]).lower().removesuffix(".git")


def _author(name: str) -> str:
    return " ".join(name.split()).casefold()


def _hash(value: str) -> str:
    match = _HASH.fullmatch(value.strip())
    return match[1].lower() if match else ""


_NORMAL = {
    "domain": _domain,
    "url": _prefix,
    "repository": _repository,
    "author": _author,
    "hash": _hash,
}


def _text_entries(line: str) -> Iterator[tuple[str, str]]:
    text = re.split(r"\s#", line, maxsplit=1)[0].strip()
    if match := _KIND.fullmatch(text):
        yield match[1].lower(), match[2]
    elif _HASH.fullmatch(text):
        yield "hash", text
    elif _DOMAIN.fullmatch(text):
        yield "domain", text
    elif "/" in text and " " not in text:
        yield "url", text
    else:
        raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {text[:100]!r}")


def _json_entries(line: str) -> Iterator[tuple[str, Any]]:
    row = json.loads(line)
    kinds = [kind for kind in KINDS if isinstance(row, dict) and kind in row]
    if not kinds:
        raise ValueError(f"expected an object with a key of {', '.join(KINDS)}, got {line[:100]}")
    for kind in kinds:
        yield kind, row[kind]


def _bounded(lines: Iterable[str]) -> Iterator[str]:
    size = 0
    for line in lines:
        size += len(line)
        if size > MAX_TOML:
            raise InputError(f"opt-out list: expected at most {MAX_TOML:,} characters, got more")
        yield line


@contextmanager
def _open(path: Path) -> Iterator[Iterator[str]]:
    """Open a file, which gzip or zstd may have compressed, and yield its lines. A line that is too
    long comes cut to one character more than allowed.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a file, got none")
    with open_stream(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", "replace", newline=None)
        yield _lines(text)


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE + 1):
        start = line
        while len(line) > MAX_LINE and not line.endswith("\n"):
            line = text.readline(MAX_LINE + 1)
        yield start
