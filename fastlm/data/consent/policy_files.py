"""The policy files of a site: which of them count for a page, and parsed ones in a cache.

Three rules to choose from (`MODES`): "as-crawled", the files of the time when the page was fetched,
as AIPREF asks for; "latest", the newest files applied to old pages, as Apertus did; "strictest",
all of them, and one "no" is a "no".
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from fastlm.data.consent import ai_txt, robots, rsl, tdmrep
from fastlm.errors import InputError, show

T = TypeVar("T")

MODES = ("as-crawled", "latest", "strictest")
TOLERANCE = timedelta(days=1)  # a clock may be wrong by this much before its date is in the future
CRAWL = timedelta(days=30)  # a crawl lasts no longer: a file that was fetched later is of another
MAX_SNAPSHOTS = 50  # of "strictest": a site that changes its files more often is sampled
CACHED_CHARACTERS = 32_000_000
CACHED_FILES = 20_000


class PolicyFile(NamedTuple):
    """A fetched policy file. date: of the fetch, ISO 8601 (``WARC-Date``) or a datetime; status:
    of the response.
    """

    url: str
    date: datetime | str | None
    status: int
    text: str


Policies = Mapping[str, str | PolicyFile]


def parse_date(date: datetime | str | None) -> datetime | None:
    """Return a date with its time zone (UTC if it names none), None for none or an unusable one."""
    if isinstance(date, str):
        try:
            date = datetime.fromisoformat(date.strip())
        except ValueError:
            return None
    if date is None:
        return None
    return date.replace(tzinfo=UTC) if date.tzinfo is None else date


def policies_at(
    files: Iterable[PolicyFile],
    date: datetime | str | None,
    mode: str,
    *,
    now: datetime | None = None,
    crawl: timedelta = CRAWL,
) -> list[dict[str, PolicyFile]]:
    """Return the policy files that count for a page fetched at ``date``: one mapping from address
    to file, or several for "strictest", of which the most restrictive verdict counts.

    as-crawled: of each address the last file at or before ``date``, else the first one at most
    ``crawl`` later. A page without a date gets "strictest". latest: the newest of each address.
    strictest: the state of the site after each change. Dates in the future (by more than a day) do
    not count if there are others, else they mean now; a file without a date is the oldest.
    InputError: an unknown mode.
    """
    if mode not in MODES:
        raise InputError(f"consent: expected one of {', '.join(MODES)}, got {show(mode)}")
    now = now or datetime.now(UTC)
    by_address: dict[str, list[tuple[datetime, PolicyFile]]] = {}
    for file in files:
        time = parse_date(file.date) or datetime.min.replace(tzinfo=UTC)
        by_address.setdefault(file.url, []).append((time, file))
    for address, versions in by_address.items():
        past = [version for version in versions if version[0] <= now + TOLERANCE]
        by_address[address] = past or [(now, file) for _, file in versions]
        by_address[address].sort(key=lambda version: version[0])
    if mode == "latest":
        return [{address: versions[-1][1] for address, versions in by_address.items()}]
    fetched = parse_date(date)
    if mode == "strictest" or fetched is None:
        return _snapshots(by_address)
    fetched = min(fetched, now)
    snapshot = {}
    for address, versions in by_address.items():
        before = [file for time, file in versions if time <= fetched]
        after = [file for time, file in versions if fetched < time <= fetched + crawl]
        if before or after:
            snapshot[address] = before[-1] if before else after[0]
    return [snapshot]


def _snapshots(
    by_address: Mapping[str, Sequence[tuple[datetime, PolicyFile]]],
) -> list[dict[str, PolicyFile]]:
    """Return the state of all files after each change of one of them."""
    events = sorted(
        ((time, file) for versions in by_address.values() for time, file in versions),
        key=lambda event: event[0],
    )
    state = {address: versions[0][1] for address, versions in by_address.items()}
    snapshots = [dict(state)]
    for _, file in events:
        if (file.status, file.text) != (state[file.url].status, state[file.url].text):
            state[file.url] = file
            snapshots.append(dict(state))
    step = -(-len(snapshots) // MAX_SNAPSHOTS)
    return [*snapshots[:-1:step], snapshots[-1]]


class ParseCache:
    """Parsed files by their text: the least recently used ones go when it is full.

    A site has thousands of pages and few files; the mapping of a page holds texts, not objects,
    because pages travel between processes.
    """

    def __init__(self, parse: Callable[[str], Any], characters: int, files: int):
        self._parse, self._max_characters, self._max_files = parse, characters, files
        self._parsed: OrderedDict[str, Any] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def __call__(self, text: str) -> Any:
        with self._lock:
            if (value := self._parsed.get(text)) is not None:
                self._parsed.move_to_end(text)
                return value
        value = self._parse(text)
        with self._lock:
            if text not in self._parsed:
                self._parsed[text] = value
                self._characters += len(text)
            while self._parsed and (
                self._characters > self._max_characters or len(self._parsed) > self._max_files
            ):
                self._characters -= len(self._parsed.popitem(last=False)[0])
        return value

    def clear(self) -> None:
        with self._lock:
            self._parsed.clear()
            self._characters = 0


_PARSERS = {
    "robots": robots.RobotsFile,
    "tdmrep": tdmrep.TdmFile,
    "ai_txt": ai_txt.AiTxt,
    "rsl": rsl.RslDocument,
}
CACHES = {
    kind: ParseCache(parse, CACHED_CHARACTERS // len(_PARSERS), CACHED_FILES // len(_PARSERS))
    for kind, parse in _PARSERS.items()
}


def is_html(text: str) -> bool:
    """Return whether a file begins like a page. A site without the file often answers 200 with
    one.
    """
    head = text[:1000].lstrip("\ufeff \t\r\n").lower()
    return head.startswith(("<!doctype html", "<html", "<head", "<body", "<!--", "<script", "<div"))


def usable_text(kind: str, policy: str | PolicyFile) -> tuple[str | None, str]:
    """Return (the text of a policy file, "") or (None, the reason why it is no policy)."""
    text, status = (policy, 200) if isinstance(policy, str) else (policy.text, policy.status)
    if not 200 <= status < 300:
        return None, f"status {status}"
    if kind != "rsl" and is_html(text):
        return None, "a page, not a policy"
    return text, ""


def file_kind(address: str) -> str:
    """Return which standard a policy file belongs to, by its address."""
    path = address.partition("?")[0]
    if path.endswith(tdmrep.PATH):
        return "tdmrep"
    host_and_path = path.partition("://")[2].partition("/")[2]
    if host_and_path == robots.PATH[1:]:
        return "robots"
    if f"/{host_and_path}" in ai_txt.PATHS:
        return "ai_txt"
    return "rsl"


def policy_problems(
    policies: Policies | Iterable[PolicyFile], *, now: datetime | None = None
) -> list[str]:
    """Return what is wrong with policy files, a line each: files that count as no policy or are
    read in part, dates in the future. For the counts of a build; no error.
    """
    now = now or datetime.now(UTC)
    if isinstance(policies, Mapping):
        items = [(str(address), policy) for address, policy in policies.items()]
    else:
        items = [(file.url, file) for file in policies]
    problems = []
    for address, policy in items:
        kind = file_kind(address)
        text, reason = usable_text(kind, policy)
        problem = reason if text is None else CACHES[kind](text).problem
        if problem:
            problems.append(f"{address}: {problem}")
        time = None if isinstance(policy, str) else parse_date(policy.date)
        if time and time > now + TOLERANCE:
            problems.append(f"{address}: date in the future, {time.isoformat()}")
    return problems
