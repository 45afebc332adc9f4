"""Decide whether a model may be trained on a page, by all standards."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from fastlm.data.consent import ai_txt, aipref, content_signal, noai, robots, rsl, tdmrep
from fastlm.data.consent.crawlers import product_tokens
from fastlm.data.consent.page import HeaderFields, Response
from fastlm.data.consent.path_matcher import normal_path
from fastlm.data.consent.policy_files import (
    CACHES,
    Policies,
    PolicyFile,
    policies_at,
    usable_text,
)
from fastlm.data.consent.policy_index import PolicyIndex
from fastlm.data.consent.statement import NOTHING, Consent, most_restrictive
from fastlm.errors import InputError

STANDARDS = tuple(
    module.STANDARD for module in (robots, aipref, content_signal, tdmrep, rsl, noai, ai_txt)
)

_ADDRESS = re.compile(r"<?(https?)://(?:[^/?#@]*@)?([^/?#>]*)([^#>]*)", re.IGNORECASE)
_PORTS = {"http": ":80", "https": ":443"}


def decide(
    url: str,
    *,
    date: datetime | str | None = None,
    headers: HeaderFields | None = None,
    html: str | bytes | None = None,
    policies: Policies | Sequence[PolicyFile] | PolicyIndex | None = None,
    crawler: str | Sequence[str] | None = None,
    mode: str = "as-crawled",
) -> Consent:
    """Decide whether a model may be trained on the page ``url``. This is no legal advice.

    date: of the fetch. headers: of the response, names in any case, a value may be a list. html:
    the page or its head; at most 64 KiB are examined. policies: the policy files of the site by
    address, as text (of a 200 answer) or `PolicyFile`; or `PolicyFile`s of several dates, or a
    `PolicyIndex` of many sites, from which ``mode`` and ``date`` select (`policies_at`). crawler: a
    product token, or several: a "no" to one of them is a "no"; None is the dated default list
    (`default_crawlers`).

    Return the most restrictive statement of all standards, which each have their own precedence;
    ``Consent("unknown")`` if none says anything, or ``url`` is no web address. Content never
    raises. InputError: an unknown mode, a crawler without a product token, a policy file under a
    name that is no web address, or as bytes.
    """
    tokens = product_tokens(crawler)
    if isinstance(policies, Mapping):
        _check(policies)
        return _decide(_Page(url, headers, html, policies, tokens))
    snapshots: Sequence[Mapping[str, Any]]
    if isinstance(policies, PolicyIndex):
        snapshots = policies.views(url, date, mode)
    else:
        snapshots = policies_at(policies or (), date, mode) or [{}]
    if len(snapshots) == 1:
        return _decide(_Page(url, headers, html, snapshots[0], tokens))
    decisions = (_decide(_Page(url, headers, html, s, tokens)) for s in snapshots)
    spoken = [decision for decision in decisions if decision.standard]
    return most_restrictive(spoken) or NOTHING


def _check(policies: Mapping[Any, Any]) -> None:
    """Refuse what would count as no policy by mistake."""
    for address, policy in policies.items():
        if not (isinstance(address, str) and _ADDRESS.match(address)):
            expected = "addresses such as https://x.org/robots.txt"
            raise InputError(f"policies: expected {expected}, got {address!r:.80}")
        if not isinstance(policy, str | PolicyFile):
            raise InputError(
                f"policies: expected text of {address:.80}, got {type(policy).__name__}"
            )


def statements(
    url: str,
    *,
    headers: HeaderFields | None = None,
    html: str | bytes | None = None,
    policies: Policies,
    crawler: str | Sequence[str] | None = None,
) -> list[Consent]:
    """Return what each standard says that says something; arguments as for `decide`."""
    return list(_statements(_Page(url, headers, html, policies, product_tokens(crawler))))


def _decide(page: "_Page") -> Consent:
    result = NOTHING
    for statement in _statements(page):
        if statement.verdict == "no":
            return statement
        result = most_restrictive((result, statement)) if result.standard else statement
        assert result is not None
    return result


class _Page:
    """A page with the parsed policy files of its site."""

    def __init__(
        self,
        url: str,
        headers: HeaderFields | None,
        html: str | bytes | None,
        policies: Mapping[str, Any],
        crawlers: tuple[str, ...],
    ):
        self.response = Response(headers, html)
        self.policies, self.crawlers = policies, crawlers
        match = _ADDRESS.match(url)
        self.origins: tuple[str, ...] = ()
        self.path = "/"
        if match:
            scheme, host, path = match.groups()
            scheme, host = scheme.lower(), host.lower().removesuffix(_PORTS[scheme.lower()])
            other = "http" if scheme == "https" else "https"
            # a site answers the same on both schemes; the file is often fetched on one
            self.origins = (f"{scheme}://{host}", f"{other}://{host}")
            self.path = normal_path(path or "/")

    def file(self, path: str) -> tuple[str, Any] | None:
        """Return (address, policy) of a file of the site."""
        for origin in self.origins:
            address = origin + path
            if (policy := self.policies.get(address)) is not None:
                return address, policy
        return None

    def parsed(self, kind: str, path: str) -> tuple[Any, str] | None:
        """Return (parsed file, address), None for none that is usable."""
        if (file := self.file(path)) is None:
            return None
        text, _ = usable_text(kind, file[1])
        return None if text is None else (CACHES[kind](text), file[0])


def _statements(page: _Page) -> Iterator[Consent]:
    """Yield the statements of the standards, in the order of `STANDARDS`."""
    path, crawlers, headers = page.path, page.crawlers, page.response.headers
    present: list[Consent | None] = []
    file = page.parsed("robots", robots.PATH) if page.policies else None
    if file:
        present.append(robots.path_statement(*file, path, crawlers))
    elif page.policies and (unusable := page.file(robots.PATH)):
        present.append(_unreachable(*unusable))
    yield from filter(None, present)
    is_fetchable = not any(present)
    usage = [aipref.header_statement(headers.get("content-usage", ()))]
    signals = [content_signal.header_statement(headers.get("content-signal", ()))]
    if file and is_fetchable:  # what may not be fetched has no preference
        usage.append(aipref.robots_statement(*file, path, crawlers))
        signals.append(content_signal.robots_statement(*file, path, crawlers))
    yield from filter(None, (most_restrictive(usage), most_restrictive(signals)))
    if statement := _tdm(page):
        yield statement
    if statement := _rsl(page, file):
        yield statement
    if statement := noai.header_statement(headers.get("x-robots-tag", ()), crawlers):
        yield statement
    elif statement := noai.meta_statement(page.response.head.metas, crawlers):
        yield statement
    if page.policies:
        files = (page.parsed("ai_txt", name) for name in ai_txt.PATHS)
        texts = (ai[0].statement(ai[1], path, crawlers) for ai in files if ai)
        if statement := most_restrictive(texts):
            yield statement


def _unreachable(address: str, policy: str | PolicyFile) -> Consent | None:
    """Return "no" for a robots.txt that answered 5xx (RFC 9309, section 2.3.1.4)."""
    status = 200 if isinstance(policy, str) else policy.status
    if not 500 <= status < 600:
        return None
    rule = f"status {status}: complete disallow (RFC 9309, section 2.3.1.4)"
    return Consent("no", robots.STANDARD.name, rule, address)


def _tdm(page: _Page) -> Consent | None:
    """Return what TDMRep says: the page over the header over the file."""
    if statement := tdmrep.meta_statement(page.response.head.metas):
        return statement
    if statement := tdmrep.header_statement(page.response.headers.get("tdm-reservation", ())):
        return statement
    file = page.parsed("tdmrep", tdmrep.PATH) if page.policies else None
    return tdmrep.file_statement(*file, page.path) if file else None


def _rsl(page: _Page, file: tuple[robots.RobotsFile, str] | None) -> Consent | None:
    head = page.response.head
    if not (head.links or head.scripts or "link" in page.response.headers):
        if file is None or not file[0].names_licence:
            return None
    origin = page.origins[0] if page.origins else ""
    documents = rsl.Documents(page.policies or {}, _parse_rsl)
    return rsl.statement(page.response, file, documents, origin, page.path, page.crawlers)


def _parse_rsl(policy: str | PolicyFile) -> rsl.RslDocument | None:
    text, _ = usable_text("rsl", policy)
    return None if text is None else CACHES["rsl"](text)


def count_verdicts(decisions: Iterable[Consent]) -> dict[str, int]:
    """Return how many pages each verdict and standard has: ``{"no: robots.txt": 3, ...}``."""
    counts: dict[str, int] = {}
    for decision in decisions:
        key = f"{decision.verdict}: {decision.standard or 'nothing said'}"
        counts[key] = counts.get(key, 0) + 1
    return counts
