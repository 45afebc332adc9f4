"""The licence that a page states, and whether an allow-list has it.

A page states its licence by an element with ``rel="license"`` (``<link>``, ``<a>``), by the header
``Link`` with that relation, by an RSL licence whose ``<standard>`` is a Creative Commons address,
or by the words "licensed under" before a link to Creative Commons. A link to Creative Commons
alone is not enough: it may be the licence of one picture. Pages that state two licences have none
here.

Names are those of SPDX, by the table below; other addresses stay as they are.
"""

import fnmatch
import re
from collections.abc import Iterable

from fastlm.data.consent.page import MAX_VALUE, HeaderFields, head_text, read_headers
from fastlm.data.consent.rsl import NAMESPACE

MAX_PAGE = 1 << 20  # characters of a page that are searched: the licence often stands at its end
MAX_EXPRESSION = 1000  # characters of a licence

_CC = re.compile(
    r"https?://(?:www\.)?creativecommons\.org/(licenses|publicdomain)/([a-z+-]+)/(\d\.\d)"
    r"(?:/([a-z]{2,3})(?![a-z]))?",
    re.IGNORECASE,
)
_CC_KINDS = frozenset("by by-sa by-nc by-nd by-nc-sa by-nc-nd".split())
_PORTS = frozenset("at au de igo nl us uk fr".split())  # with their own SPDX name for some version
_PORTED = frozenset(
    "CC-BY-2.5-AU CC-BY-3.0-AT CC-BY-3.0-AU CC-BY-3.0-DE CC-BY-3.0-IGO CC-BY-3.0-NL CC-BY-3.0-US"
    " CC-BY-NC-3.0-DE CC-BY-NC-ND-3.0-DE CC-BY-NC-ND-3.0-IGO CC-BY-NC-SA-2.0-DE CC-BY-NC-SA-2.0-FR"
    " CC-BY-NC-SA-2.0-UK CC-BY-NC-SA-3.0-DE CC-BY-NC-SA-3.0-IGO CC-BY-ND-3.0-DE CC-BY-SA-2.0-UK"
    " CC-BY-SA-3.0-AT CC-BY-SA-3.0-DE CC-BY-SA-3.0-IGO".split()
)
_ADDRESSES = (
    (re.compile(r"gnu\.org/(?:licenses|copyleft)/fdl(?:-(1\.[123]))?"), "GFDL-{}"),
    (re.compile(r"gnu\.org/licenses/((?:a|l)?gpl)-(\d\.\d)"), "{}-{}"),
    (re.compile(r"apache\.org/licenses/LICENSE-(2\.0|1\.1)", re.IGNORECASE), "Apache-{}"),
    (re.compile(r"spdx\.org/licenses/([A-Za-z0-9.+-]+?)(?:\.html|\.json)?(?=$|[?#/])"), "{}"),
    (re.compile(r"opensource\.org/licen[sc]es?/([A-Za-z0-9.-]+)"), "{}"),
    (re.compile(r"opendatacommons\.org/licenses/(odbl|by|pddl)(?=[/?#]|$)"), "ODC-{}"),
)
_ODC = {"ODC-odbl": "ODbL-1.0", "ODC-by": "ODC-By-1.0", "ODC-pddl": "PDDL-1.0"}

# an element with rel="license" and an href, in either order
_ELEMENT = re.compile(r"<(?:link|a)\b[^<>]{0,2000}>", re.IGNORECASE)
_REL = re.compile(r"\brel\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>]+))", re.IGNORECASE)
_HREF = re.compile(r"\bhref\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>]+))", re.IGNORECASE)
_TYPE = re.compile(r"\btype\s*=\s*[\"']?application/rsl\+xml", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_PHRASE = re.compile(
    r"(?:licen[sc]ed|available|released|published|distributed)\s+(?:\w+\s+){0,4}under\b",
    re.IGNORECASE,
)
_HEADER = re.compile(r"<([^<>]*)>[^,]*?;\s*rel\s*=\s*\"?[^\";,]*\blicense\b", re.IGNORECASE)
_STANDARD = re.compile(r"<(?:\w+:)?standard\s*>\s*([^<\s]+)\s*<")


def licence_of(html: str | None, headers: HeaderFields | None = None) -> str | None:
    """Return the licence that a page or its response states, as an SPDX name where the address is
    known, else the address. None if it states none, or several.
    """
    stated = list(_of_header(headers))
    if html:
        page = html if len(html) <= MAX_PAGE else html[: MAX_PAGE // 2] + html[-MAX_PAGE // 2 :]
        stated += _of_elements(page)
        if not stated and NAMESPACE in page:
            stated += [a for a in _STANDARD.findall(head_text(html)) if _CC.match(a)]
        if not stated:
            stated += _of_phrases(page)
    names = {name for address in stated if (name := spdx_name(address))}
    return names.pop() if len(names) == 1 else None


def _of_header(headers: HeaderFields | None) -> Iterable[str]:
    for value in read_headers(headers).get("link", ()):
        yield from (a for a in _HEADER.findall(value[:MAX_VALUE]) if "rsl+xml" not in value)


def _of_elements(page: str) -> Iterable[str]:
    if "license" not in page and "LICENSE" not in page:
        return
    for match in _ELEMENT.finditer(page):
        element = match[0]
        if "license" not in element.lower():  # most links: three searches less
            continue
        rel, href = _REL.search(element), _HREF.search(element)
        if rel and href and not _TYPE.search(element):
            words = next(filter(None, rel.groups()), "").lower().split()
            if "license" in words:
                yield next(filter(None, href.groups()), "")


def _of_phrases(page: str) -> Iterable[str]:
    if "reativecommons" not in page:
        return
    for match in _CC.finditer(page):
        before = page[max(0, match.start() - 600) : match.start()]
        start = before.rfind("<")  # of the element that has the link
        text = _TAG.sub(" ", before[: max(start, 0)])[-200:]
        if _PHRASE.search(text):
            yield match[0]


def spdx_name(address: str) -> str | None:
    """Return the SPDX name of a licence's address, the address itself if it is not known, None for
    an empty one.
    """
    address = address.strip()[:MAX_EXPRESSION]
    if match := _CC.search(address):
        return _creative_commons(*match.groups())
    for pattern, name in _ADDRESSES:
        if match := pattern.search(address):
            values = [value or "" for value in match.groups()]
            if name == "{}-{}":
                values[0] = values[0].upper()
            text = name.format(*values).rstrip("-")
            return _ODC.get(text, text)
    return address or None


def _creative_commons(folder: str, kind: str, version: str, port: str | None) -> str:
    kind = kind.lower()
    if folder.lower() == "publicdomain":
        return f"CC0-{version}" if kind == "zero" else f"CC-PDM-{version}"
    if kind not in _CC_KINDS:
        parts = set(kind.split("-"))  # by-nd-nc, the order of version 1.0
        kind = next((name for name in _CC_KINDS if set(name.split("-")) == parts), kind)
    name = f"CC-{kind.upper()}-{version}"
    ported = f"{name}-{(port or '').upper()}"
    return ported if ported in _PORTED else name


_TOKEN = re.compile(r"\s*(\(|\)|\bAND\b|\bOR\b|\bWITH\b|,|[^\s(),]+)", re.IGNORECASE)


def allowed(licence: str | None, allow: Iterable[str]) -> bool:
    """Return whether an allow-list has a licence.

    licence: an SPDX expression (``MIT OR GPL-2.0-only``: one is enough; ``AND``, commas: all are
    needed), or any other text, which is compared as a whole. allow: names; case does not count and
    ``*`` stands for any characters (``CC-BY-4*``; ``CC-BY-*`` has the non-commercial ones as well).
    An exception (``WITH ...``) only adds rights. No licence is not allowed.
    """
    if not licence or len(licence) > MAX_EXPRESSION:
        return False
    patterns = [name.strip().lower() for name in allow]
    if _has(licence, patterns):
        return True
    tokens = _TOKEN.findall(licence)
    try:
        value, rest = _any_of(tokens, patterns)
    except (IndexError, RecursionError):
        return False
    return value and not rest


def _has(name: str, patterns: Iterable[str]) -> bool:
    name = name.strip().lower()
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _any_of(tokens: list[str], patterns: list[str]) -> tuple[bool, list[str]]:
    value, tokens = _all_of(tokens, patterns)
    while tokens and tokens[0].upper() == "OR":
        other, tokens = _all_of(tokens[1:], patterns)
        value = value or other
    return value, tokens


def _all_of(tokens: list[str], patterns: list[str]) -> tuple[bool, list[str]]:
    value, tokens = _one(tokens, patterns)
    while tokens and tokens[0].upper() in ("AND", ","):
        other, tokens = _one(tokens[1:], patterns)
        value = value and other
    return value, tokens


def _one(tokens: list[str], patterns: list[str]) -> tuple[bool, list[str]]:
    if tokens[0] == "(":
        value, tokens = _any_of(tokens[1:], patterns)
        if tokens[0] != ")":
            raise IndexError
        return value, tokens[1:]
    value = _has(tokens[0], patterns)
    tokens = tokens[1:]
    if len(tokens) > 1 and tokens[0].upper() == "WITH":
        tokens = tokens[2:]
    return value, tokens
