"""Content Signals of Cloudflare: ``Content-Signal: [path] search=yes, ai-train=no`` in robots.txt.

``ai-train`` decides. A site that says nothing about it "neither grants nor restricts"; but
``use=immediate`` and ``use=reference`` (since August 2026) are upper bounds of use, below what
training does, so they count as "no" where ``ai-train`` is not stated; ``use=full`` says nothing
about training. A value other than yes and no is no signal.

Two decisions that differ from fast-robotstxt, which reads these lines as well:

- A path limits the signal to it (contentsignals.org); the longest path that matches decides, lines
  with equal paths count together, the most restrictive first. fast-robotstxt reads no path.
- A crawler that has a group of its own does not obey ``*``, not for signals either (RFC 9309,
  section 2.2.1). fast-robotstxt answers with the signal of ``*`` if the crawler's group has none.
  The default list of crawlers contains ``*``, so such a signal still counts for a corpus.

The header ``Content-Signal``, which no specification defines and Cloudflare's converter sends with
``ai-train=yes`` by default, counts only where it says "no".
"""

import re
from collections.abc import Iterator, Sequence

from fastlm.data.consent.path_matcher import normal_pattern
from fastlm.data.consent.robots import RobotsFile, RobotsGroup, UsageRule, usage_statement
from fastlm.data.consent.statement import Consent, Standard, quote

STANDARD = Standard(
    "content-signal",
    "Content Signals Policy with `use`; draft-romm-aipref-contentsignals-00",
    "2026-08-31",
    "https://contentsignals.org",
)
KEY = "content-signal"

_BOUNDS = ("immediate", "reference")
_PATH = re.compile(r"([/*]\S*)\s+(.*)", re.DOTALL)


def signal(text: str) -> str:
    """Return what a list of signals says about training: "yes", "no" or "unknown"."""
    train = use = ""
    for item in text.lower().split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        if key == "ai-train" and value in ("yes", "no"):
            train = "no" if "no" in (train, value) else "yes"  # of two, the most restrictive
        elif key == "use" and value in _BOUNDS:
            use = value
    return train or ("no" if use else "unknown")


def robots_statement(
    robots: RobotsFile, address: str, path: str, crawlers: tuple[str, ...]
) -> Consent | None:
    """Return what the ``Content-Signal`` lines for the crawlers say."""
    return usage_statement(STANDARD, robots, address, path, crawlers, _rules)


def _rules(group: RobotsGroup) -> Iterator[UsageRule]:
    for line in group.extensions[KEY]:
        match = _PATH.fullmatch(line.value)
        pattern, text = match.groups() if match else ("", line.value)
        yield UsageRule(normal_pattern(pattern), signal(text), line)


def header_statement(values: Sequence[str]) -> Consent | None:
    """Return "no" if a ``Content-Signal`` field of the response says so, else None."""
    for value in values:
        if signal(value) == "no":
            return Consent("no", STANDARD.name, quote(value), "header Content-Signal")
    return None
