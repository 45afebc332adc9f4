"""The policy files of many sites: in memory, or in a database that the workers of a build share.

A build writes the policy files of all its archives once (`write_policies`); each worker opens the
database and reads the files of a site when it meets a page of it. So a worker's memory does not
grow with the number of sites.

Rejected: all files in each worker (a million sites have some GB); a file per site (a million
files).
"""

import hashlib
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

from fastlm.data.consent.policy_files import (
    CACHES,
    CRAWL,
    MAX_SNAPSHOTS,
    TOLERANCE,
    Version,
    check_mode,
    file_kind,
    parse_date,
    site_of,
    usable_text,
    version_at,
    versions_by_address,
)
from fastlm.errors import InputError
from fastlm.files import save_atomic
from fastlm.sources.warc import PolicyFile

CACHED_SITES = 2_000  # pages of a site stand together in an archive


class PolicyIndex:
    """The policy files of many sites, for the pages of a build: `decide` takes it as ``policies``.

    files: in any order, several dates of one address. now: what dates in the future are compared
    with; the date of the plan, so that a later run of the build gives the same verdicts.
    """

    def __init__(self, files: Iterable[PolicyFile] = (), now: datetime | None = None):
        sites: dict[str, list[PolicyFile]] = {}
        for file in files:
            sites.setdefault(site_of(file.url), []).append(file)
        self._init(lambda site: sites.get(site, ()), len(sites), now)

    def _init(
        self, load: Callable[[str], Sequence[PolicyFile]], count: int, now: datetime | None
    ) -> None:
        self._load, self._count, self._now = load, count, now or datetime.now(UTC)
        self._sites: OrderedDict[str, dict[str, list[Version]]] = OrderedDict()
        self._changes: dict[str, list[datetime]] = {}

    @classmethod
    def open(cls, path: str | Path, now: datetime | None = None) -> "PolicyIndex":
        """Return the index of a database of `write_policies`. InputError: not such a file."""
        try:
            database = sqlite3.connect(
                f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1", uri=True
            )
            (count,) = database.execute("SELECT COUNT(DISTINCT site) FROM policy").fetchone()
        except sqlite3.Error as error:
            raise InputError(f"{path}: expected policy files, got: {error}") from error
        query = "SELECT url, date, status, text FROM policy WHERE site = ? ORDER BY rowid"

        def load(site: str) -> list[PolicyFile]:
            key = site.encode("utf-8", "surrogatepass")
            return [
                PolicyFile(_decode(url), date, status, _decode(text))
                for url, date, status, text in database.execute(query, (key,))
            ]

        index = cls.__new__(cls)
        index._init(load, count, now)
        return index

    def __len__(self) -> int:
        """Return the number of sites."""
        return self._count

    def versions(self, site: str) -> dict[str, list[Version]]:
        """Return the files of a site by address, in the order of their dates."""
        if (versions := self._sites.get(site)) is not None:
            self._sites.move_to_end(site)
            return versions
        versions = self._sites[site] = versions_by_address(self._load(site), self._now)
        if len(self._sites) > CACHED_SITES:
            old, _ = self._sites.popitem(last=False)
            self._changes.pop(old, None)
        return versions

    def views(self, url: str, date: datetime | str | None, mode: str) -> "list[PolicyView]":
        """Return the states of all files that count for a page, as `policies_at` says. "strictest"
        has the states after each change of a file of the site of ``url`` or of a licence that its
        robots.txt names.
        """
        check_mode(mode)
        fetched, site = parse_date(date), site_of(url)
        if mode == "latest":
            times = [self._now + TOLERANCE]
        elif mode == "as-crawled" and fetched is not None:
            times = [min(fetched, self._now)]
        else:
            times = self._times(site)
        return [PolicyView(self, site, time) for time in times]

    def _times(self, site: str) -> list[datetime]:
        versions = self.versions(site)
        if site not in self._changes:
            histories = dict(versions)
            for address in versions:
                if file_kind(address) == "robots":
                    for _, file in versions[address]:
                        for licence in _licences(file):
                            other = self.versions(site_of(licence))
                            histories[licence] = other.get(licence, [])
            times: set[datetime] = set()
            for history in histories.values():
                before = None
                for time, file in history:
                    if file.text != before:
                        times.add(time)
                    before = file.text
            ordered = sorted(times) or [self._now]
            step = -(-len(ordered) // MAX_SNAPSHOTS)
            self._changes[site] = [*ordered[:-1:step], ordered[-1]]
        return self._changes[site]


class PolicyView(Mapping[str, PolicyFile]):
    """The files of a `PolicyIndex` as they were at a time, by address. It lists those of one site,
    and finds those of all.
    """

    def __init__(self, index: PolicyIndex, site: str, time: datetime):
        self._index, self._site, self._time = index, site, time
        self._versions = index.versions(site)

    def get(self, address: str, default: Any = None) -> Any:
        versions = self._versions.get(address)
        if versions is None:
            if address.partition("://")[2].startswith(f"{self._site}/"):
                return default
            versions = self._index.versions(site_of(address)).get(address)
        file = None if versions is None else version_at(versions, self._time, CRAWL)
        return default if file is None else file

    def __getitem__(self, address: str) -> PolicyFile:
        if (file := self.get(address)) is None:
            raise KeyError(address)
        return file

    def __bool__(self) -> bool:
        return bool(self._index)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        return (address for address in self._versions if self.get(address) is not None)


class PolicySummary(TypedDict):
    """What was written: the number of versions of files and of sites, the first and the last date
    of a fetch (None: without dates), and the SHA-256 of all of it.
    """

    files: int
    sites: int
    first: str | None
    last: str | None
    sha256: str


def write_policies(path: str | Path, files: Iterable[PolicyFile]) -> PolicySummary:
    """Write the policy files of a build for `PolicyIndex.open`; the same file twice counts once.
    Return what was written, which belongs into the plan: it decides the result.
    InputError: not writable.
    """
    digest = hashlib.sha256()
    counts = []

    def write(part: Path) -> None:
        database = sqlite3.connect(part)
        try:
            database.executescript(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                "CREATE TABLE new (site BLOB, url BLOB, date TEXT, status INTEGER, text BLOB);"
                "CREATE TABLE policy (site BLOB, url BLOB, date TEXT, status INTEGER, text BLOB);"
            )
            database.executemany("INSERT INTO new VALUES (?, ?, ?, ?, ?)", map(_row, files))
            database.execute(
                "INSERT INTO policy SELECT DISTINCT * FROM new"
                " ORDER BY site, url, date, status, text"
            )
            database.commit()
            database.executescript("DROP TABLE new; CREATE INDEX by_site ON policy (site); VACUUM;")
            for row in database.execute("SELECT * FROM policy ORDER BY rowid"):
                for value in row:
                    data = value if isinstance(value, bytes) else str(value).encode()
                    digest.update(len(data).to_bytes(8, "little") + data)
            counts[:] = database.execute(
                "SELECT COUNT(*), COUNT(DISTINCT site), MIN(NULLIF(date, '')),"
                " MAX(NULLIF(date, '')) FROM policy"
            ).fetchone()
        finally:
            database.close()

    try:
        save_atomic(path, write)
    except sqlite3.Error as error:
        raise InputError(f"{path}: expected a writable file, got: {error}") from error
    count, sites, first, last = counts
    return {"files": count, "sites": sites, "first": first, "last": last,
            "sha256": digest.hexdigest()}  # fmt: skip


def _row(file: PolicyFile) -> tuple[bytes, bytes, str, int, bytes]:
    # as bytes: SQLite's text has no lone surrogates, and addresses come from anybody
    url, text = (value.encode("utf-8", "surrogatepass") for value in (file.url, file.text))
    site = site_of(file.url).encode("utf-8", "surrogatepass")
    return site, url, file.date.encode("ascii", "replace").decode(), file.status, text


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _licences(file: PolicyFile) -> list[str]:
    """Return the addresses of the licences that a robots.txt names."""
    text, _ = usable_text("robots", file)
    return [] if text is None else CACHES["robots"](text).licence_addresses(file.url)
