"""TDM Reservation Protocol of a W3C community group (final report, 10 May 2024).

``tdm-reservation`` is 1 (text and data mining is reserved: "no") or 0 (not reserved: "yes"); any
other value counts as not set. It stands in ``/.well-known/tdmrep.json``, in a response header, in
``<meta name="tdm-reservation">``. A header replaces the file, HTML replaces both. In the file the
first location that matches decides, and only it. ``tdm-policy``, the address of an offer, is quoted
and not followed: a licence that nobody took is no consent.

In JSON the text "1" counts as 1, since nothing else can be meant; the text "0" does not.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastlm.data.consent.page import MetaElement
from fastlm.data.consent.path_matcher import (
    PathMatcher,
    normal_pattern,
    path_matcher,
    too_many_wildcards,
)
from fastlm.data.consent.statement import Consent, Standard, quote

STANDARD = Standard(
    "tdmrep",
    "W3C Community Group Final Report",
    "2024-05-10",
    "https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/",
)
PATH = "/.well-known/tdmrep.json"

MAX_CHARACTERS = 1 << 20
MAX_RULES = 2_000  # compared one by one
_VERDICTS = {"0": "yes", "1": "no"}


class TdmRule(NamedTuple):
    """An object of tdmrep.json."""

    pattern: str
    verdict: str  # "unknown": not set
    text: str
    line: int


class TdmFile:
    """A parsed tdmrep.json."""

    def __init__(self, text: str):
        self.rules: list[TdmRule] = []
        self.problem = ""
        self._matchers: dict[int, PathMatcher] = {}
        if len(text) > MAX_CHARACTERS:
            self.problem = f"{len(text):,} characters, more than {MAX_CHARACTERS:,}"
            return
        try:
            self._parse(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            self.rules, self.problem = [], f"not a JSON array: {quote(str(error))}"
        if problem := too_many_wildcards(rule.pattern for rule in self.rules):
            self.problem, self.rules = problem, [TdmRule("/", "no", problem, 1)]
        self._any = path_matcher([(False, rule.pattern) for rule in self.rules])

    def _parse(self, text: str) -> None:
        if not isinstance(json.loads(text), list):
            raise ValueError("expected [...]")
        decoder = json.JSONDecoder()
        position, line, counted = text.index("[") + 1, 1, 0
        while True:
            while text[position] in " \t\r\n,":
                position += 1
            if text[position] == "]":
                return
            value, end = decoder.raw_decode(text, position)
            line += text.count("\n", counted, position)
            counted = position
            self._add(value, " ".join(text[position:end].split()), line)
            position = end

    def _add(self, value: Any, text: str, line: int) -> None:
        location = value.get("location") if isinstance(value, dict) else None
        if not isinstance(location, str) or not location.startswith(("/", "*")):
            self.problem = self.problem or f"line {line}: expected a location, got {quote(text)}"
        elif len(self.rules) == MAX_RULES:
            self.problem = f"line {line}: expected at most {MAX_RULES:,} rules, got more"
        else:
            verdict = _reservation(value.get("tdm-reservation"))
            self.rules.append(TdmRule(normal_pattern(location), verdict, quote(text), line))

    def match(self, path: str) -> TdmRule | None:
        """Return the first rule in sequence whose location matches."""
        if not self.rules or self._any.match(path) is None:
            return None
        for i, rule in enumerate(self.rules):
            if i not in self._matchers:
                self._matchers[i] = path_matcher([(False, rule.pattern)])
            if self._matchers[i].match(path) is not None:
                return rule
        return None


def _reservation(value: Any) -> str:
    if isinstance(value, bool):
        return "unknown"
    if value == "1":
        return "no"
    return _VERDICTS.get(str(value), "unknown") if isinstance(value, int) else "unknown"


def file_statement(file: TdmFile, address: str, path: str) -> Consent | None:
    """Return what tdmrep.json says about ``path``."""
    rule = file.match(path)
    if rule is None or rule.verdict == "unknown":
        return None
    return Consent(rule.verdict, STANDARD.name, rule.text, f"{address}, line {rule.line}")


def header_statement(values: Sequence[str]) -> Consent | None:
    """Return what the header ``tdm-reservation`` says; of two values the most restrictive."""
    verdicts = {_VERDICTS.get(part.strip()) for value in values for part in value.split(",")}
    verdict = "no" if "no" in verdicts else "yes" if "yes" in verdicts else ""
    if not verdict:
        return None
    rule = f"tdm-reservation: {', '.join(values)}"
    return Consent(verdict, STANDARD.name, quote(rule), "header tdm-reservation")


def meta_statement(metas: Sequence[MetaElement]) -> Consent | None:
    """Return what ``<meta name="tdm-reservation">`` says; of two the most restrictive."""
    contents = [meta.content for meta in metas if meta.name == "tdm-reservation"]
    for content in sorted(contents, reverse=True):
        if verdict := _VERDICTS.get(content):
            rule = f'<meta name="tdm-reservation" content="{content}">'
            return Consent(verdict, STANDARD.name, rule, "html meta tdm-reservation")
    return None
