"""``noai`` in the header ``X-Robots-Tag`` or in ``<meta name="robots">``. It can only say "no".

An informal convention of DeviantArt (2022): pages with ``noai`` or ``noimageai`` are to be left out
of data sets, the text as well. ``noml`` (Mojeek) says the same of machine learning. A header or a
meta element with the name of a crawler speaks to that crawler only.
"""

import re
from collections.abc import Sequence

from fastlm.data.consent.page import MetaElement
from fastlm.data.consent.statement import Consent, Standard, quote

STANDARD = Standard(
    "noai",
    "DeviantArt's directives noai and noimageai",
    "2022-11-11",
    "https://www.deviantart.com/team/journal/UPDATE-All-Deviations-Are-Opted-Out-of-AI-Datasets-934500371",
)
DIRECTIVES = frozenset({"noai", "noimageai", "noml"})
# directives of X-Robots-Tag with a value, which are no names of crawlers
_VALUES = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview", "content-usage"}
)
_TOKEN = re.compile(r"\s*([a-z0-9_-]+|\*)\s*")
_SEPARATOR = re.compile(r"[,\s]+")


def header_statement(values: Sequence[str], crawlers: tuple[str, ...]) -> Consent | None:
    """Return "no" if an ``X-Robots-Tag`` field has one of the directives for the crawlers. After
    ``name:`` the directives are for the crawler of that name, until the next.
    """
    names = {"*", "robots", *(crawler.lower() for crawler in crawlers)}
    for value in values:
        applies = True
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and (token := _TOKEN.fullmatch(name)) and token[1] not in _VALUES:
                applies, part = token[1] in names, rest
            if applies and DIRECTIVES.intersection(part.split()):
                return Consent("no", STANDARD.name, quote(value), "header X-Robots-Tag")
    return None


def meta_statement(metas: Sequence[MetaElement], crawlers: tuple[str, ...]) -> Consent | None:
    """Return "no" if a meta element of the name "robots" or of a crawler has such a directive."""
    names = {"robots", *(crawler.lower() for crawler in crawlers)}
    for meta in metas:
        if meta.name in names and DIRECTIVES.intersection(_SEPARATOR.split(meta.content.lower())):
            rule = f'<meta name="{meta.name}" content="{meta.content}">'
            return Consent("no", STANDARD.name, quote(rule), f"html meta {meta.name}")
    return None
