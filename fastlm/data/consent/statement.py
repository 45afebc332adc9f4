"""What a standard is, what it says about a page, and how statements combine."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

MAX_RULE = 200  # characters of a rule that is quoted: a line of a file may have any length


class Standard(NamedTuple):
    """A standard with the version that this package follows."""

    name: str
    version: str
    date: str  # of the version, ISO 8601
    url: str


class Consent(NamedTuple):
    """The answer to "may a model be trained on this page?", with the rule that decides.

    verdict: "yes", "no" or "unknown". standard: the name of the standard, "" if none says anything.
    rule: its text as written. source: where the rule stands ("https://x/robots.txt, line 7").

    "unknown" with a rule means that the page may be used under a condition that a program cannot
    judge (credit, the kind of user). Such a statement outweighs the "yes" of another standard.
    """

    verdict: str
    standard: str = ""
    rule: str = ""
    source: str = ""


NOTHING = Consent("unknown")
_RANK = {"no": 0, "unknown": 1, "yes": 2}


def quote(rule: str) -> str:
    """Return a rule in one line of printable characters, cut to `MAX_RULE`."""
    text = " ".join(rule[: 4 * MAX_RULE].split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= MAX_RULE else f"{text[: MAX_RULE - 3]}..."


def most_restrictive(statements: Iterable[Consent | None]) -> Consent | None:
    """Return the first of the most restrictive statements: "no", then "unknown" under a condition,
    then "yes". None if there is no statement. (draft-ietf-aipref-vocab, section 5.1, for AIPREF.)
    """
    present = [statement for statement in statements if statement is not None]
    return min(present, key=lambda statement: _RANK[statement.verdict], default=None)


def for_all(statements: Sequence[Consent | None]) -> Consent | None:
    """Combine what one standard says to several crawlers: "no" to one is "no", "yes" must be said
    to each of them.
    """
    if len(statements) == 1:
        return statements[0]
    result = most_restrictive(statements)
    if result is not None and result.verdict == "yes" and None in statements:
        return None
    return result
