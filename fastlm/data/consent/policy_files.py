"""The policy files of a site: which of them count for a page, and parsed ones in a cache.

Three rules to choose from (`MODES`): "as-crawled", the files of the time when the page was fetched,
as AIPREF asks for; "latest", the newest files applied to old pages, as Apertus did; "strictest",
all of them, and one "no" is a "no".
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from fastlm.data.consent import ai_txt, robots, rsl, tdmrep
from fastlm.errors import InputError, show
from fastlm.sources.warc import PolicyFile

MODES = ("as-crawled", "latest", "strictest")
TOLERANCE = timedelta(days=1)  # a clock may be wrong by this much before its date is in the future
CRAWL = timedelta(days=30)  # a crawl lasts no longer: a file that was fetched later is of another
MAX_SNAPSHOTS = 50  # of "strictest": a site that changes its files more often is sampled
CACHED_CHARACTERS = 32_000_000
CACHED_FILES = 20_000


Policies = Mapping[str, str | PolicyFile]
Version = tuple[datetime, PolicyFile]
_OLDEST = datetime.min.replace(tzinfo=UTC)


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
    ``crawl`` later. A page without a date gets "strictest". latest: the newest of each address. A
    file that could not be read (5xx) counts only if there is none to fall back to (RFC 9309,
    section 2.4). strictest: the state of the site after each change. Dates in the future (by more
    than a day) do not count if there are others, else they mean ``now``; a file without a date is
    the oldest. InputError: an unknown mode.
    """
    check_mode(mode)
    now = now or datetime.now(UTC)
    by_address = versions_by_address(files, now)
    fetched = parse_date(date)
    if mode == "strictest" or (mode == "as-crawled" and fetched is None):
        return _snapshots(by_address)
    time = now + TOLERANCE if mode == "latest" or fetched is None else min(fetched, now)
    chosen = {
        address: version_at(versions, time, crawl) for address, versions in by_address.items()
    }
    return [{address: file for address, file in chosen.items() if file}]


def check_mode(mode: str) -> None:
    """Raise InputError if ``mode`` is not one of `MODES`."""
    if mode not in MODES:
        raise InputError(f"consent: expected one of {', '.join(MODES)}, got {show(mode)}")


def versions_by_address(files: Iterable[PolicyFile], now: datetime) -> dict[str, list[Version]]:
    """Return the files of each address in the order of their dates."""
    by_address: dict[str, list[Version]] = {}
    for file in files:
        by_address.setdefault(file.url, []).append((parse_date(file.date) or _OLDEST, file))
    for address, versions in by_address.items():
        past = [version for version in versions if version[0] <= now + TOLERANCE]
        by_address[address] = past or [(now, file) for _, file in versions]
        by_address[address].sort(key=lambda v: (v[0], v[1].status, v[1].text))
    return by_address


def version_at(versions: Sequence[Version], time: datetime, crawl: timedelta) -> PolicyFile | None:
    """Return the version that counted at a time: the last before it, else the next."""
    end = bisect_right(versions, time, key=lambda version: version[0])
    for _, file in reversed(versions[:end]):
        if file.status < 500:
            return file
    if end:
        return versions[end - 1][1]
    return versions[0][1] if versions[0][0] <= time + crawl else None


def _snapshots(by_address: Mapping[str, Sequence[Version]]) -> list[dict[str, PolicyFile]]:
    """Return the state of all files after each change of one of them."""
    events = sorted(
        (version for versions in by_address.values() for version in versions),
        key=lambda version: version[0],
    )
    state = {address: versions[0][1] for address, versions in by_address.items()}
    snapshots = [dict(state)]
    for _, file in events:
        if file.status >= 500 > state[file.url].status:
            continue  # the copy before it counts
        if (file.status, file.text) != (state[file.url].status, state[file.url].text):
            state[file.url] = file
            snapshots.append(dict(state))
    step = -(-len(snapshots) // MAX_SNAPSHOTS)
    return [*snapshots[:-1:step], snapshots[-1]]


def site_of(address: str) -> str:
    """Return the host of an address, without its scheme and the ports 80 and 443."""
    rest = address.partition("://")[2]
    host = rest[: min((i for i in map(rest.find, "/?#") if i >= 0), default=len(rest))]
    return host.rpartition("@")[2].lower().removesuffix(":443").removesuffix(":80")


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


ABSENT = ("status 404", "status 410")  # reasons of `usable_text`


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
    read in part, dates in the future. A file that the site does not have is no problem. For the
    counts of a build; no error.
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
        if reason in ABSENT:  # most sites have no ai.txt
            continue
        if problem:
            problems.append(f"{address}: {problem}")
        time = None if isinstance(policy, str) else parse_date(policy.date)
        if time and time > now + TOLERANCE:
            problems.append(f"{address}: date in the future, {time.isoformat()}")
    return problems
