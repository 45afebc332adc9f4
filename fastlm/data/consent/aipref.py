"""AI preferences of the IETF (drafts): ``Content-Usage`` as a response header and in robots.txt.

A statement is a Dictionary of RFC 9651: ``train-ai=n, search=y``. Only ``train-ai`` decides here.
A value other than the tokens ``y`` and ``n`` is no preference; if the Dictionary cannot be parsed,
all of it says nothing; of equal keys the last counts; unknown keys and parameters are ignored
(vocabulary, section 6). Labels of earlier drafts (``bots``, ``train-genai``) are unknown keys. The
vocabulary's version 08 (September 2026) adds ``ai-use`` and leaves ``train-ai`` as it is.

In robots.txt: ``Content-Usage: [path] preferences``. The longest path that matches decides; equal
paths and header and file together: the most restrictive. Paths that may not be fetched have no
preference (attachment, section 3.1). The file of the fetch counts, later ones do not (section 3.3):
see `fastlm.data.consent.policy_files`.

http-sf parses the Dictionaries.
"""

from collections.abc import Iterator, Sequence

from fastlm.data.consent.path_matcher import normal_pattern
from fastlm.data.consent.robots import RobotsFile, RobotsGroup, UsageRule, usage_statement
from fastlm.data.consent.statement import Consent, Standard, quote

STANDARD = Standard(
    "aipref",
    "draft-ietf-aipref-vocab-07, draft-ietf-aipref-attach-05",
    "2026-08-19",
    "https://datatracker.ietf.org/wg/aipref/documents/",
)
KEY = "content-usage"  # of the header and of the line

MAX_CHARACTERS = 8192  # of a statement; servers limit headers to about as much


def preference(statement: str) -> str:
    """Return what a Dictionary says about training: "yes", "no" or "unknown"."""
    from http_sf import StructuredFieldError, Token, parse

    if len(statement) > MAX_CHARACTERS:
        return "unknown"
    try:
        members = parse(statement.encode(), tltype="dictionary")
    except (StructuredFieldError, UnicodeEncodeError):
        return "unknown"
    assert isinstance(members, dict)
    item = members.get("train-ai")
    value = item[0] if isinstance(item, tuple) else None
    if not isinstance(value, Token):
        return "unknown"
    return {"y": "yes", "n": "no"}.get(str(value), "unknown")


def header_statement(values: Sequence[str]) -> Consent | None:
    """Return what the ``Content-Usage`` fields of a response say, None for nothing."""
    text = ", ".join(values)
    verdict = preference(text) if text else "unknown"
    if verdict == "unknown":
        return None
    return Consent(verdict, STANDARD.name, quote(text), "header Content-Usage")


def robots_statement(
    robots: RobotsFile, address: str, path: str, crawlers: tuple[str, ...]
) -> Consent | None:
    """Return what the ``Content-Usage`` lines for the crawlers say."""
    return usage_statement(STANDARD, robots, address, path, crawlers, _rules)


def _rules(group: RobotsGroup) -> Iterator[UsageRule]:
    for line in group.extensions[KEY]:
        pattern, statement = "", line.value
        if statement.startswith("/"):
            pattern, _, statement = statement.replace("\t", " ").partition(" ")
        yield UsageRule(normal_pattern(pattern), preference(statement.strip()), line)
