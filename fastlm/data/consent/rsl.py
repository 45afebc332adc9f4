"""Really Simple Licensing 1.0 (10 December 2025, errata to 7 August 2026).

A licence document (XML) is named by ``License:`` in robots.txt (of the crawler's group, else
outside of groups), by ``Link: <...>; rel="license"; type="application/rsl+xml"``, by such a
``<link>`` in the head, or stands there in ``<script type="application/rsl+xml">``. Licences of the
page replace those of the site (section 4.9); a document that is missing or broken is no licence.
A reference is followed once, from the page or robots.txt to the document; what the document refers
to is not followed, so references in a circle do no harm.

Inside a document (section 3.1.1) order means nothing and the narrowest ``<content url>`` that says
something about training decides; the longest pattern counts as the narrowest. There:

- ``<prohibits type="usage">`` with all, ai-all or ai-train: "no", whatever is permitted.
- ``<permits type="usage">`` with one of them: "yes" if free and without a condition. With a payment
  or a licence server "no", because nothing was bought. With a condition that this program cannot
  judge (credit, contribution, reports, kind of user, country, other terms) "unknown".
- ``<permits type="usage">`` without them: "no", "only the listed values are allowed" (3.5).
- neither: nothing.

A document with an unknown element of RSL's namespace is not conformant: it can prohibit, but not
permit. The commas and tokens of the draft 0.9 are read.

expat parses; entity declarations are refused and nothing external is read.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastlm.data.consent.page import Response
from fastlm.data.consent.path_matcher import (
    PathMatcher,
    normal_pattern,
    path_matcher,
    too_many_wildcards,
)
from fastlm.data.consent.robots import RobotsFile, RobotsLine, join
from fastlm.data.consent.statement import Consent, Standard, most_restrictive, quote

STANDARD = Standard("rsl", "RSL 1.0 with errata", "2026-08-07", "https://rslstandard.org/rsl")
NAMESPACE = "https://rslstandard.org/rsl"
TYPE = "application/rsl+xml"

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 64  # RSL itself nests 5 deep, a feed around it a few more
MAX_ELEMENTS = 20_000
MAX_ORIGINS = 64  # sites of a document whose scopes are kept
MAX_DOCUMENTS = 8  # named by one page or one site
TRAINING = frozenset({"all", "ai-all", "ai-train"})

_FREE, _CONDITIONAL = ("free",), ("attribution", "contribution")
_ELEMENTS = frozenset(
    "rsl content license permits prohibits payment standard custom amount accepts reporting legal"
    " alternate schema copyright terms".split()
)
_LINK = re.compile(r"<([^<>]*)>((?:\s*;\s*[\w*-]+(?:\s*=\s*(?:\"[^\"]*\"|[^\s\";,]+))?)*)")
_PARAMETER = re.compile(r"([\w*-]+)\s*=\s*(?:\"([^\"]*)\"|([^\s\";,]+))")
_ORIGIN = re.compile(r"https?://[^/?#]*", re.IGNORECASE)


@dataclass
class Term:
    """``<permits>`` or ``<prohibits>``."""

    name: str
    type: str
    line: int
    tokens: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f'<{self.name} type="{self.type}">{" ".join(sorted(self.tokens))}</{self.name}>'


@dataclass
class Licence:
    """``<license>`` with what it asks for."""

    terms: list[Term] = field(default_factory=list)
    payment: str = ""  # the type of the payment
    other_terms: bool = False  # standard, custom or amount of a payment without a type
    reporting: bool = False


@dataclass
class Content:
    """``<content>``: the assets that licences are for."""

    url: str
    server: str
    line: int
    licences: list[Licence] = field(default_factory=list)


class RslDocument:
    """A parsed licence document."""

    def __init__(self, text: str):
        self.contents: list[Content] = []
        self.conformant = True
        self.problem = ""
        self._scopes: dict[tuple[str, bool], _Scopes] = {}
        if len(text) > MAX_CHARACTERS:
            self.problem = f"{len(text):,} characters, more than {MAX_CHARACTERS:,}"
            return
        try:
            _Reader(self).read(text.removeprefix("\ufeff").strip())
        except _Refused as error:
            self.contents, self.problem = [], str(error)
            return
        if not self.contents:
            self.problem = "no <content> of RSL's namespace"
        if problem := too_many_wildcards(content.url for content in self.contents):
            self.problem = problem
            term = Term("prohibits", "usage", 1, frozenset({"all"}))
            self.contents = [Content("/", "", 1, [Licence([term])])]

    def statement(
        self, address: str, where: str, origin: str, path: str, of_page: bool
    ) -> Consent | None:
        """Return what the document says about training with the asset ``path`` of ``origin``.

        where: the place that names the document. of_page: whether that is the page itself; then
        ``url=""`` means the page.
        """
        scopes = self._scopes.get((origin, of_page))
        if scopes is None:
            if len(self._scopes) == MAX_ORIGINS:
                self._scopes.clear()
            scopes = self._scopes[origin, of_page] = _Scopes(self.contents, origin, of_page)
        for contents in scopes.matching(path):
            if statement := self._evaluate(contents, address):
                source = f"{statement.source} ({where})" if where else statement.source
                return statement._replace(source=source)
        return None

    def _evaluate(self, contents: Sequence[Content], address: str) -> Consent | None:
        grants, refusals = [], []
        for content in contents:
            for licence in content.licences:
                uses = [term for term in licence.terms if term.type == "usage"]
                for term in uses:
                    source = f"{address}, line {term.line}"
                    if term.name == "prohibits":
                        if TRAINING & term.tokens:
                            return Consent("no", STANDARD.name, quote(str(term)), source)
                    elif TRAINING & term.tokens:
                        verdict, condition = _condition(licence, content)
                        rule = f"{quote(str(term))}{condition}"
                        grants.append(Consent(verdict, STANDARD.name, rule, source))
                    else:
                        refusals.append(Consent("no", STANDARD.name, quote(str(term)), source))
        if not self.conformant:
            grants = [grant for grant in grants if grant.verdict == "no"]
        for verdict in ("yes", "unknown", "no"):  # each licence is an offer: the best one counts
            for grant in grants:
                if grant.verdict == verdict:
                    return grant
        return refusals[0] if refusals else None


class _Scopes:
    """The contents of a document by their patterns for one site, the narrowest first."""

    def __init__(self, contents: Sequence[Content], origin: str, of_page: bool):
        by_pattern: dict[str, list[Content]] = {}
        for content in contents:
            if (pattern := _scope(content.url, origin, of_page)) is not None:
                by_pattern.setdefault(pattern, []).append(content)
        self._page = by_pattern.pop("", None)  # the page itself, narrower than any pattern
        self._patterns = sorted(by_pattern.items(), key=lambda item: len(item[0]), reverse=True)
        self._any = path_matcher([(False, pattern) for pattern, _ in self._patterns])
        self._each: dict[int, PathMatcher] = {}

    def matching(self, path: str) -> Iterator[Sequence[Content]]:
        """Yield the contents that are for ``path``, the narrowest first."""
        if self._page:
            yield self._page
        first = self._any.match(path) if self._patterns else None
        if first is None:
            return
        yield self._patterns[first][1]
        for i in range(first + 1, len(self._patterns)):
            if i not in self._each:
                self._each[i] = path_matcher([(False, self._patterns[i][0])])
            if self._each[i].match(path) is not None:
                yield self._patterns[i][1]


def _condition(licence: Licence, content: Content) -> tuple[str, str]:
    """Return (verdict of a permission, the condition that is attached to it)."""
    if content.server:
        return "no", f", licence server {quote(content.server)}"
    if licence.payment and licence.payment not in _FREE + _CONDITIONAL:
        return "no", f", payment {quote(licence.payment)}"
    if licence.payment in _CONDITIONAL:
        return "unknown", f", payment {licence.payment}"
    if licence.other_terms:
        return "unknown", ", other terms"
    if licence.reporting:
        return "unknown", ", reporting"
    if any(term.type in ("user", "geo") for term in licence.terms):
        return "unknown", ", for some users"
    return "yes", ""


def _scope(url: str, origin: str, of_page: bool) -> str | None:
    """Return the pattern of a ``url`` attribute for paths of ``origin``; "" for the page itself,
    None for other sites.
    """
    if not url:
        return "" if of_page else None
    if match := _ORIGIN.match(url):
        if match[0].lower().partition("://")[2] != origin.lower().partition("://")[2]:
            return None
        url = url[match.end() :] or "/"
    return normal_pattern(url if url.startswith(("/", "*")) else f"/{url}")


class _Refused(Exception):
    """A document that is not read, with the reason."""


class _Reader:
    """The handlers of expat."""

    def __init__(self, document: RslDocument):
        self.document = document
        self.depth = self.elements = 0
        self.content: Content | None = None
        self.licence: Licence | None = None
        self.term: Term | None = None
        self.in_payment = False
        self.text: list[str] = []

    def read(self, text: str) -> None:
        from xml.parsers import expat

        if not text.startswith("<"):
            raise _Refused("not XML")
        self.parser = parser = expat.ParserCreate("utf-8", namespace_separator=" ")
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = self.text.append
        parser.EntityDeclHandler = self._refuse_entity
        try:
            # the text is decoded already: encode it as the parser was told, whatever it declares
            parser.Parse(text.encode("utf-8", "replace"), True)
        except expat.ExpatError as error:
            raise _Refused(f"not XML: {error}") from None

    def _refuse_entity(self, *_: object) -> None:
        raise _Refused("declares an entity")

    def _start(self, full: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        self.elements += 1
        if self.depth > MAX_DEPTH or self.elements > MAX_ELEMENTS:
            raise _Refused(f"more than {MAX_DEPTH} levels or {MAX_ELEMENTS:,} elements")
        namespace, _, name = full.rpartition(" ")
        if namespace != NAMESPACE:
            return
        line = self.parser.CurrentLineNumber
        self.text.clear()
        if name not in _ELEMENTS:
            self.document.conformant = False
        elif name == "content":
            url, server = (attributes.get(key, "").strip() for key in ("url", "server"))
            self.content = Content(url, server, line)
            self.document.contents.append(self.content)
        elif name == "license" and self.content:
            self.licence = Licence()
            self.content.licences.append(self.licence)
        elif self.licence:
            kind = attributes.get("type", "").strip()
            if name in ("permits", "prohibits"):
                self.term = Term(name, kind or "usage", line)
                self.licence.terms.append(self.term)
            elif name == "payment":
                self.licence.payment, self.in_payment = kind.lower(), True
            elif self.in_payment and name in ("standard", "custom", "amount"):
                self.licence.other_terms = not self.licence.payment
            elif name == "reporting":
                self.licence.reporting = True

    def _end(self, full: str) -> None:
        self.depth -= 1
        name = full.removeprefix(f"{NAMESPACE} ")
        if name == full:
            return
        if name in ("permits", "prohibits") and self.term:
            words = "".join(self.text).replace(",", " ").split()
            self.term.tokens, self.term = frozenset(word.lower() for word in words), None
        elif name == "payment":
            self.in_payment = False
        elif name == "license":
            self.licence = None
        elif name == "content":
            self.content = None
        self.text.clear()


def linked_licences(response: Response) -> list[tuple[str, str]]:
    """Return (address as written, where it stands) of the licences that a response names."""
    links: list[tuple[str, str]] = []
    for value in response.headers.get("link", ()):
        if "license" not in value:
            continue
        for target, parameters in _LINK.findall(value):
            values = {key.lower(): a or b for key, a, b in _PARAMETER.findall(parameters)}
            is_licence = "license" in values.get("rel", "").lower().split()
            if is_licence and values.get("type", "").lower() == TYPE:
                links.append((target.strip(), "header Link"))
    for link in response.head.links:
        if "license" in link.rel and link.type == TYPE:
            links.append((link.href, "html link license"))
    return links


def statement(
    response: Response,
    robots: tuple[RobotsFile, str] | None,
    documents: "Documents",
    origin: str,
    path: str,
    crawlers: tuple[str, ...],
) -> Consent | None:
    """Return what the licences of a page, or else those of its site, say about training.

    robots: the parsed file and its address. documents: finds a parsed document by its address.
    """
    statements: list[Consent | None] = []
    has_licence = False
    for text in response.head.scripts[:MAX_DOCUMENTS]:
        if (document := documents.inline(text)) and not document.problem:
            has_licence = True
            statements.append(document.statement("html script rsl", "", origin, path, True))
    for href, where in linked_licences(response)[:MAX_DOCUMENTS]:
        address = join(origin + path, href)
        if (document := documents.get(address)) and not document.problem:
            has_licence = True
            statements.append(document.statement(address, where, origin, path, True))
    if has_licence or robots is None:
        return most_restrictive(statements)
    file, robots_address = robots
    lines: dict[int, RobotsLine] = {}  # of all crawlers; the lines of a group hide the global ones
    for _, group in file.groups(crawlers):
        lines |= {line.number: line for line in group.extensions["license"] or file.licences}
    for line in list(lines.values())[:MAX_DOCUMENTS]:
        address = join(robots_address, line.value)
        if (document := documents.get(address)) and not document.problem:
            where = f"{robots_address}, line {line.number}"
            statements.append(document.statement(address, where, origin, path, False))
    return most_restrictive(statements)


class Documents:
    """Licence documents among the policy files of a site; parsed ones come from a cache."""

    def __init__(self, files: Mapping[str, Any], parse: Callable[[Any], RslDocument | None]):
        self._files, self._parse = files, parse

    def get(self, address: str) -> RslDocument | None:
        file = self._files.get(address)
        return None if file is None else self._parse(file)

    def inline(self, text: str) -> RslDocument | None:
        return self._parse(text)
