"""Find personal data in a text and replace it by numbered placeholders.

    >>> replace("Ann <ann@mail.org>, +1 212 555 2671, again ann@mail.org")
    ('Ann <EMAIL_1>, <PHONE_1>, again <EMAIL_1>', {'email': 2, 'phone': 1})

Kinds: ``email``, ``phone``, ``ip``, ``card`` (payment cards), ``iban``, ``key`` (private keys, API
keys, tokens) and ``national`` (identity and tax numbers of persons, extra ``data``). Names and
street addresses are not found: that needs a model of the language, and a model finds them in
novels, too.

All matchers start from what ordinary text rarely has: "@", six digits in a row of groups, the
prefix of a key. One scan for digits serves telephones, cards and national numbers.

Rejected: Presidio, scrubadub and similar tools, which run a spaCy model on each document, and
patterns alone, which take time stamps for cards (docs/data.md has the counts).
"""

import re
from collections import Counter
from collections.abc import Sequence

from fastlm.data.personal.addresses import find_emails, find_ips
from fastlm.data.personal.keys import find_keys
from fastlm.data.personal.numbers import (
    LETTER_DIGITS,
    check_library,
    find_cards,
    find_ibans,
    find_national,
)
from fastlm.data.personal.phones import WEB_REGIONS, check_regions, find_phones
from fastlm.data.personal.spans import Span, digit_groups, digit_runs
from fastlm.errors import InputError, check_type

__all__ = ["DEFAULT_KINDS", "KINDS", "Placeholders", "Span", "check_kinds", "find", "replace"]

# A kind before another one wins where they overlap.
KINDS = ("key", "email", "iban", "ip", "card", "national", "phone")
DEFAULT_KINDS = tuple(kind for kind in KINDS if kind != "national")  # no extra needed
MAX_ROUNDS = 8  # two are enough for all but made-up texts
PLACEHOLDER = re.compile(rf"<({'|'.join(kind.upper() for kind in KINDS)})_([0-9]{{1,9}})>")


def check_kinds(kinds: Sequence[str]) -> None:
    """Check names of kinds. InputError: an unknown name, or its extra is missing."""
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"kinds: expected names among {', '.join(KINDS)}, got {kind!r}")
    if "national" in kinds:
        check_library()


def find(
    text: str,
    *,
    kinds: Sequence[str] = DEFAULT_KINDS,
    regions: Sequence[str] | None = WEB_REGIONS,
) -> list[Span]:
    """Return the personal data of a text, sorted by position. Spans do not overlap.

    ``regions``: countries (ISO 3166-1) whose telephone numbers are found without a country code or
    a word such as "phone" before them; None: all (`fastlm.data.personal.phones`).

    InputError: not a text, unknown kinds or regions, a missing extra.
    """
    check_type(text, "text", str, "a text")
    check_kinds(kinds)
    check_regions(regions)
    runs = digit_runs(text)
    groups = digit_groups(text, runs) if runs else []
    letters = LETTER_DIGITS.search(text) is not None
    finders = {
        "key": lambda: find_keys(text),
        "email": lambda: find_emails(text),
        "iban": lambda: find_ibans(text) if letters else (),
        "ip": lambda: find_ips(text, runs),
        "card": lambda: find_cards(text, groups),
        "national": lambda: find_national(text, groups, letters),
        "phone": lambda: find_phones(text, groups, regions),
    }
    spans = [span for kind in KINDS if kind in kinds for span in finders[kind]()]
    return _disjoint(spans, len(text)) if spans else spans


def _disjoint(spans: Sequence[Span], size: int) -> list[Span]:
    """Return the spans of a text of ``size`` characters that overlap no earlier one, sorted."""
    disjoint: list[Span] = []
    used = bytearray(size)
    for span in spans:
        if used.find(1, span.start, span.end) < 0:
            used[span.start : span.end] = b"\1" * (span.end - span.start)
            disjoint.append(span)
    return sorted(disjoint, key=lambda span: span.start)


class Placeholders:
    """Numbers of the values of one document, or of texts that belong together.

    Numbers continue after those of placeholders that a text already has: what stands for two
    persons never gets one number.
    """

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str], int] = {}
        self.last: Counter[str] = Counter()

    def copy(self) -> "Placeholders":
        """Return numbers that continue alike, such as for each of several answers to a prompt."""
        copy = Placeholders()
        copy.numbers, copy.last = dict(self.numbers), Counter(self.last)
        return copy

    def reserve(self, text: str) -> None:
        """Leave out the numbers of the placeholders in a text."""
        for kind, number in PLACEHOLDER.findall(text):
            self.last[kind.lower()] = max(self.last[kind.lower()], int(number))

    def placeholder(self, span: Span) -> str:
        key = span.kind, span.value
        if key not in self.numbers:
            self.last[span.kind] += 1
            self.numbers[key] = self.last[span.kind]
        return f"<{span.kind.upper()}_{self.numbers[key]}>"


def replace(
    text: str,
    *,
    kinds: Sequence[str] = DEFAULT_KINDS,
    regions: Sequence[str] | None = WEB_REGIONS,
    placeholders: Placeholders | None = None,
) -> tuple[str, dict[str, int]]:
    """Return (text with ``<EMAIL_1>``, ``<PHONE_1>``, ... for personal data, count of each kind).

    The same value has the same number in a text, and in all texts that share ``placeholders``.
    A second call changes nothing. Other arguments and errors: `find`.
    """
    placeholders = Placeholders() if placeholders is None else placeholders
    counts: Counter[str] = Counter()
    # A placeholder can end a run of digits, the rest of which is a number then: search again
    for _ in range(MAX_ROUNDS):
        spans = find(text, kinds=kinds, regions=regions)
        if not spans:
            break
        counts.update(span.kind for span in spans)
        text = _substitute(text, spans, placeholders)
    return text, dict(counts)


def _substitute(text: str, spans: Sequence[Span], placeholders: Placeholders) -> str:
    placeholders.reserve(text)
    parts, end = [], 0
    for span in spans:
        start, after = span.start, span.end
        if text[start - 1 : start] == "<" and text[after : after + 1] == ">":  # Ann <ann@mail.org>
            start, after = start - 1, after + 1
        parts += [text[end:start], placeholders.placeholder(span)]
        end = after
    return "".join([*parts, text[end:]])
