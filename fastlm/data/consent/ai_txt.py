"""ai.txt, in its two forms. It can only say "no".

Spawning's ``/ai.txt`` (2023) is written like robots.txt, with patterns of file names:
``User-Agent: *``, ``Disallow: *.txt``. ``/.well-known/ai.txt`` (draft-car-ai-txt-wellknown-00, 12
June 2026) has fields: ``Training: allow | deny | conditional``, with ``Training-Allow`` and
``Training-Deny`` globs for "conditional" (the longest wins), and ``Agent:`` blocks that replace the
site's fields for one crawler. Without a Training field the default of the draft holds, "deny".
``Scraping: deny`` is "no" as well. Both forms are read in both places; a file that has neither (a
Markdown file of the same name) says nothing. Both are informal, so "allow" is no consent here.

Rejected: ai.json, the same in JSON; no site with it was found.
"""

import re

from fastlm.data.consent.path_matcher import (
    normal_pattern,
    path_matcher,
    too_many_wildcards,
)
from fastlm.data.consent.robots import RobotsFile
from fastlm.data.consent.statement import Consent, Standard, quote

STANDARD = Standard(
    "ai.txt",
    "Spawning's ai.txt; draft-car-ai-txt-wellknown-00",
    "2026-06-12",
    "https://datatracker.ietf.org/doc/draft-car-ai-txt-wellknown/",
)
PATHS = ("/ai.txt", "/.well-known/ai.txt")

MAX_CHARACTERS = 1 << 18
MAX_GLOBS = 1_000
_ROBOTS = re.compile(r"^[ \t]*user-?agent[ \t]*:", re.IGNORECASE | re.MULTILINE)
_FIELD = re.compile(r"([ \t]*)([A-Za-z-]{1,40})[ \t]*:[ \t]*(.*)")
_SITE_FIELDS = frozenset({"site-name", "site-url", "training", "scraping", "indexing", "agent"})
_AGENT_FIELDS = frozenset({"training", "scraping", "indexing", "caching", "rate-limit"})

Field = tuple[str, int]  # value, line


class AiTxt:
    """A parsed ai.txt."""

    def __init__(self, text: str):
        self.problem = ""
        self.robots: RobotsFile | None = None
        self.fields: dict[str, dict[str, Field]] = {}  # by agent, "" for the site
        self.globs: list[tuple[bool, str, str, int]] = []  # is it a denial?, pattern, text, line
        if len(text) > MAX_CHARACTERS:
            self.problem = f"{len(text):,} characters, more than {MAX_CHARACTERS:,}"
        elif _ROBOTS.search(text):
            self.robots = RobotsFile(text)
        else:
            self._parse(text)
            if not _SITE_FIELDS & self.fields.get("", {}).keys() and len(self.fields) < 2:
                self.fields, self.problem = {}, "neither of the two forms of ai.txt"
            if problem := too_many_wildcards(glob[1] for glob in self.globs):
                self.problem, self.globs = problem, []
                self.fields = {"": {"training": ("deny", 1)}}

    def _parse(self, text: str) -> None:
        agent = ""
        for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
            match = _FIELD.match(line)
            if match is None or line.lstrip().startswith("#"):
                continue
            indent, key, value = match[1], match[2].lower(), match[3].strip()
            if key == "agent":
                agent = value.split("/")[0].strip().lower()
                self.fields.setdefault(agent, {})
                continue
            if not indent:
                agent = ""
            name = agent if key in _AGENT_FIELDS else ""
            if key in ("training-allow", "training-deny") and len(self.globs) < MAX_GLOBS:
                pattern = normal_pattern(value if value.endswith("*") else f"{value}$")
                self.globs.append((key == "training-deny", pattern, line.strip(), number))
            else:
                self.fields.setdefault(name, {}).setdefault(key, (value, number))

    def statement(self, address: str, path: str, crawlers: tuple[str, ...]) -> Consent | None:
        """Return "no" if the file denies training to one of the crawlers; a condition is
        "unknown"."""
        if self.robots:
            for crawler, group in self.robots.groups(crawlers):
                if line := group.disallows(path):
                    return _consent("no", f"{line.text} ({crawler})", address, line.number)
            return None
        if not self.fields:
            return None
        statements = [self._for_crawler(crawler, address, path) for crawler in crawlers]
        present = [statement for statement in statements if statement]
        return min(present, key=lambda statement: statement.verdict != "no", default=None)

    def _for_crawler(self, crawler: str, address: str, path: str) -> Consent | None:
        site = self.fields.get("", {})
        block = self.fields.get(crawler.lower(), self.fields.get("*", {}))
        value, line = block.get("scraping") or site.get("scraping") or ("allow", 0)
        if value.lower() == "deny":
            return _consent("no", f"Scraping: {value} ({crawler})", address, line)
        field = block.get("training") or site.get("training")
        if field is None:
            return _consent("no", "Training: deny, the default", address, 0)
        value, line = field
        rule = f"Training: {value} ({crawler})"
        if value.lower() == "deny":
            return _consent("no", rule, address, line)
        if value.lower() != "conditional":
            return None
        matching = [
            glob for glob in self.globs if path_matcher([(False, glob[1])]).match(path) is not None
        ]
        if not matching:
            return _consent("unknown", rule, address, line)
        denies, _, text, line = max(matching, key=lambda glob: (len(glob[1]), glob[0]))
        return _consent("no", text, address, line) if denies else None


def _consent(verdict: str, rule: str, address: str, line: int) -> Consent:
    source = f"{address}, line {line}" if line else address
    return Consent(verdict, STANDARD.name, quote(rule), source)
