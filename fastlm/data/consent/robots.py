"""robots.txt (RFC 9309, September 2022): which paths a crawler may fetch.

It says "no" or nothing. A path that may be fetched is no consent to train on it: "These rules are
not a form of access authorization" (section 1), and AIPREF separates acquisition from use.

Groups are found here (see `path_matcher` for the reason), by the rules of Google's parser: its
spellings of keys, an agent's letters up to the first other character, groups that end at the next
User-agent line after an Allow or Disallow. A crawler obeys the groups with its name, merged, or
else those of ``*``. One addition: a product token may have digits (AI2Bot), which Google's parser
cannot match and RFC 9309 does not allow, but sites write.

A file that answered 4xx has no rules; 5xx is a complete disallow (section 2.3.1). The first
500 KiB are read (section 2.5).

The lines that other standards add (Content-Usage, Content-Signal, License) end the list of
User-agent lines above them, as rules do (draft-ietf-aipref-attach-05, section 3), but only for
these standards: Allow and Disallow are grouped as if the lines were not there (RFC 9309, section
2.2.4).
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import urljoin

from fastlm.data.consent.path_matcher import (
    PathMatcher,
    normal_pattern,
    path_matcher,
    too_many_wildcards,
)
from fastlm.data.consent.statement import Consent, Standard, for_all, quote

STANDARD = Standard(
    "robots.txt", "RFC 9309", "2022-09-09", "https://www.rfc-editor.org/rfc/rfc9309"
)
PATH = "/robots.txt"

MAX_CHARACTERS = 512_000  # "at least 500 kibibytes"
MAX_LINE = 16_664  # bytes that Google's parser reads of a line, 8 times the longest address
EXTENSIONS = ("content-usage", "content-signal", "license")

_LINES = re.compile(r"\r\n|\n|\r")
_RFC_TOKEN = re.compile(r"[A-Za-z_-]*")
_TOKEN = re.compile(r"[A-Za-z0-9_-]*")
_AGENT_KEYS = ("user-agent", "useragent", "user agent")
_DISALLOW_KEYS = ("disallow", "dissallow", "dissalow", "disalow", "diasllow", "disallaw")


class RobotsLine(NamedTuple):
    """A line that belongs to a group."""

    number: int  # from 1
    key: str  # "allow", "disallow" or one of `EXTENSIONS`
    value: str
    text: str  # as written, without the comment


class RobotsGroup:
    """All lines for one crawler."""

    def __init__(self, paths: list[RobotsLine], extensions: list[RobotsLine]):
        self.paths = [line for line in paths if line.value]  # an empty pattern matches nothing
        self.extensions: dict[str, list[RobotsLine]] = {key: [] for key in EXTENSIONS}
        for line in extensions:
            self.extensions[line.key].append(line)
        self.matcher: PathMatcher | None = None
        if any(line.key == "disallow" for line in self.paths):
            rules = [(line.key == "allow", normal_pattern(line.value)) for line in self.paths]
            self.matcher = path_matcher(rules)
        self.parsed: dict[str, object] = {}  # of the other standards, by name

    def disallows(self, path: str) -> RobotsLine | None:
        """Return the line that disallows ``path`` (`path_matcher.normal_path`)."""
        if self.matcher is None or (index := self.matcher.match(path)) is None:
            return None
        return self.paths[index]


class RobotsFile:
    """A parsed robots.txt."""

    def __init__(self, text: str):
        self.licences: list[RobotsLine] = []  # License lines outside of groups
        self.problem = ""
        if len(text) > MAX_CHARACTERS:
            self.problem = f"{len(text):,} characters: the first {MAX_CHARACTERS:,} were read"
            text = text[:MAX_CHARACTERS].rpartition("\n")[0]
        # lists of lines, and which of them belong to an agent
        self._paths: list[list[RobotsLine]] = []
        self._extensions: list[list[RobotsLine]] = []
        self._agents: dict[str, tuple[list[int], list[int]]] = {}
        self._groups: dict[tuple[tuple[int, ...], tuple[int, ...]], RobotsGroup] = {}
        self._views: dict[tuple[str, ...], list[tuple[str, RobotsGroup]]] = {}
        self._parse(text)
        lines = (line for block in (*self._paths, *self._extensions) for line in block)
        if problem := too_many_wildcards(line.value for line in lines):
            self.problem, self.licences, self._extensions = problem, [], []
            self._paths = [[RobotsLine(1, "disallow", "/", problem)]]
            self._agents = {"*": ([0], [])}
        lines = (line for block in self._extensions for line in block)
        self.names_licence = bool(self.licences) or any(line.key == "license" for line in lines)

    def _parse(self, text: str) -> None:
        after_path = after_rule = True  # a User-agent line starts a group
        for number, line in enumerate(_LINES.split(text.removeprefix("\ufeff")), 1):
            line = line[:MAX_LINE].partition("#")[0].strip()
            if not line:
                continue
            key, value = _key_value(line)
            if key == "user-agent":
                if after_path:
                    self._paths.append([])
                if after_rule:
                    self._extensions.append([])
                after_path = after_rule = False
                for token in _tokens(value):
                    paths, extensions = self._agents.setdefault(token, ([], []))
                    _add(paths, len(self._paths) - 1)
                    _add(extensions, len(self._extensions) - 1)
            elif key in ("allow", "disallow"):
                if self._paths:
                    self._paths[-1].append(RobotsLine(number, key, value, line))
                after_path = after_rule = True
            elif key in EXTENSIONS:
                if self._extensions:
                    self._extensions[-1].append(RobotsLine(number, key, value, line))
                elif key == "license":
                    self.licences.append(RobotsLine(number, key, value, line))
                after_rule = True

    def licence_addresses(self, address: str) -> list[str]:
        """Return the addresses of all licences that the file names; ``address``: its own."""
        lines = [line for block in self._extensions for line in block if line.key == "license"]
        return [join(address, line.value) for line in [*self.licences, *lines]]

    def groups(self, crawlers: tuple[str, ...]) -> list[tuple[str, RobotsGroup]]:
        """Return the groups that these product tokens obey, each once, with the first token whose
        own group it is, or "*". A token without a group of its own obeys ``*``, or nothing.
        """
        views = self._views.get(crawlers)
        if views is None:
            views = self._views[crawlers] = list(self._distinct(crawlers))
        return views

    def _distinct(self, crawlers: Sequence[str]) -> Iterator[tuple[str, RobotsGroup]]:
        done = set()
        for crawler in crawlers:
            named_group = self._agents.get(crawler.lower())
            indices = named_group or self._agents.get("*") or ([], [])
            key = (tuple(indices[0]), tuple(indices[1]))
            if key in done:
                continue
            done.add(key)
            if key not in self._groups:
                paths = [line for i in key[0] for line in self._paths[i]]
                extensions = [line for i in key[1] for line in self._extensions[i]]
                self._groups[key] = RobotsGroup(paths, extensions)
            yield (crawler if named_group else "*"), self._groups[key]


def join(base: str, address: str) -> str:
    """Return an address that may be relative to ``base``; an unusable one as it is."""
    try:
        return urljoin(base, address)
    except ValueError:
        return address


def _key_value(line: str) -> tuple[str, str]:
    """Return (key in one spelling, value) of a line. Like Google's parser, take a blank for the
    colon if the line has exactly two words.
    """
    key, colon, value = line.partition(":")
    if not colon:
        words = line.split()
        if len(words) != 2:
            return "", ""
        key, value = words
    key, value = key.strip().lower(), value.strip()
    if key.startswith(_AGENT_KEYS):
        return "user-agent", value
    if key.startswith("allow"):
        return "allow", value
    if key.startswith(_DISALLOW_KEYS):
        return "disallow", value
    return key, value


def _tokens(value: str) -> set[str]:
    """Return the names by which a User-agent line is found: "*", or the product token."""
    if value.startswith("*") and (len(value) == 1 or value[1].isspace()):
        return {"*"}
    return {_prefix(pattern, value).lower() for pattern in (_RFC_TOKEN, _TOKEN)} - {""}


def _prefix(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.match(text)
    return match[0] if match else ""


def _add(indices: list[int], index: int) -> None:
    if not indices or indices[-1] != index:
        indices.append(index)


def product_token(crawler: str) -> str:
    """Return the product token of a crawler's name: ``CCBot`` of ``CCBot/2.0``; "*" stays."""
    return "*" if crawler == "*" else _prefix(_TOKEN, crawler.strip())


def path_statement(
    robots: RobotsFile, address: str, path: str, crawlers: tuple[str, ...]
) -> Consent | None:
    """Return "no" if one of the crawlers may not fetch ``path``, else None."""
    for crawler, group in robots.groups(crawlers):
        if line := group.disallows(path):
            return Consent(
                "no",
                STANDARD.name,
                f"{quote(line.text)} (User-agent: {crawler})",
                f"{address}, line {line.number}",
            )
    return None


class UsageRule(NamedTuple):
    """What an extension line says about training, and for which paths."""

    pattern: str  # normal; "" for all paths
    verdict: str
    line: RobotsLine


class UsageRules:
    """The extension lines of one group and standard. The longest pattern that matches decides;
    lines with the same pattern count together, the most restrictive first.
    """

    def __init__(self, rules: Sequence[UsageRule]):
        order = ("no", "yes", "unknown")
        self.by_pattern: dict[str, UsageRule] = {}
        for rule in sorted(rules, key=lambda rule: order.index(rule.verdict)):
            self.by_pattern.setdefault(rule.pattern, rule)
        self._patterns = [pattern for pattern in self.by_pattern if pattern]
        self._matcher = path_matcher([(False, pattern) for pattern in self._patterns])

    def match(self, path: str) -> UsageRule | None:
        """Return the rule for ``path``. A rule that says nothing hides shorter ones."""
        index = self._matcher.match(path) if self._patterns else None
        pattern = "" if index is None else self._patterns[index]
        rule = self.by_pattern.get(pattern)
        return rule if rule and rule.verdict != "unknown" else None


def usage_statement(
    standard: Standard, robots: RobotsFile, address: str, path: str, crawlers: tuple[str, ...], read
) -> Consent | None:
    """Return what the extension lines of a standard say to all of the crawlers.

    read: the function that turns a group's lines into `UsageRule`s.
    """
    statements: list[Consent | None] = []
    for crawler, group in robots.groups(crawlers):
        rules = group.parsed.get(standard.name)
        if rules is None:
            rules = group.parsed[standard.name] = UsageRules(read(group))
        assert isinstance(rules, UsageRules)
        rule = rules.match(path) if rules.by_pattern else None
        if rule is None:
            statements.append(None)
            continue
        text = f"{quote(rule.line.text)} (User-agent: {crawler})"
        source = f"{address}, line {rule.line.number}"
        statements.append(Consent(rule.verdict, standard.name, text, source))
    return for_all(statements) if statements else None
