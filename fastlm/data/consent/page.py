"""The parts of a response that can say something about its use: headers and the head of the page.

Most pages say nothing. A page is parsed only if its head has one of the words that a statement
would need, which takes 5 microseconds instead of 60 for parsing. The words must be written as
such: an attribute that spells them with character references is not seen. resiliparse parses.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

MAX_HEAD = 65_536  # characters of a page that are examined
MAX_VALUE = 16_384  # characters of a header or an attribute
HEADERS = frozenset({"x-robots-tag", "content-usage", "content-signal", "tdm-reservation", "link"})
_WORDS = ("noai", "noimageai", "noml", "tdm-reservation", "rsl+xml")

HeaderFields = Mapping[str, Any] | Iterable[tuple[str, Any]]


class MetaElement(NamedTuple):
    """``<meta name content>``; the name in small letters."""

    name: str
    content: str


class LinkElement(NamedTuple):
    """``<link rel type href>``; rel as a set of small words."""

    rel: frozenset[str]
    type: str
    href: str


class PageHead(NamedTuple):
    """The elements of a head."""

    metas: list[MetaElement]
    links: list[LinkElement]
    scripts: list[str]  # inline licences: the text of <script type="application/rsl+xml">


EMPTY = PageHead([], [], [])


class Response:
    """Headers and page of a response, each read when it is needed."""

    def __init__(self, headers: HeaderFields | None, html: str | bytes | None):
        self.headers = read_headers(headers)
        self._html = html

    @cached_property
    def head(self) -> PageHead:
        return read_head(self._html)


def read_headers(headers: HeaderFields | None) -> dict[str, list[str]]:
    """Return the values of the `HEADERS`, names in small letters, each field as its own value. A
    line break in a value separates fields, too.
    """
    fields: dict[str, list[str]] = {}
    if not headers:
        return fields
    items: Any = headers.items() if isinstance(headers, Mapping) else headers
    for name, value in items:
        key = name.lower() if isinstance(name, str) else ""
        if key in HEADERS:
            values = value if isinstance(value, list | tuple) else (value,)
            lines = (line for text in values for line in str(text)[:MAX_VALUE].split("\n"))
            fields.setdefault(key, []).extend(line.strip() for line in lines)
    return fields


def head_text(html: str | bytes | None) -> str:
    """Return the markup of a page to the end of its head, at most `MAX_HEAD` characters."""
    if not html:
        return ""
    text = html[:MAX_HEAD]
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    ends = [text.find(tag) for tag in ("</head", "</HEAD", "<body", "<BODY")]
    end = min((position for position in ends if position >= 0), default=-1)
    if end < 0:
        return text
    head = text[:end]
    # the tag may stand in a script or a comment: then the head ends later
    if head.count("<script") > head.count("</script") or head.count("<!--") > head.count("-->"):
        return text
    return head


def read_head(html: str | bytes | None) -> PageHead:
    """Return the elements of a page's head that can matter, none for unusable markup."""
    text = head_text(html)
    if not text:
        return EMPTY
    lower = text.lower()
    if not any(word in lower for word in _WORDS):
        return EMPTY
    from resiliparse.parse.html import HTMLTree

    try:
        # no markup of this length takes more than 0.05 s (fastlm.data.nesting has the reasons)
        head = HTMLTree.parse(text).head
        selection = head.query_selector_all("meta[name], link[rel], script") if head else None
        # not iterated: resiliparse 2.0.1 takes cubic time for that, 17 s for 3,000 elements
        elements = selection.values() if selection else []
    except (ValueError, RuntimeError):
        return EMPTY
    metas, links, scripts = [], [], []
    for element in elements:
        value = _attribute(element)
        if element.tag == "meta":
            metas.append(MetaElement(value("name").lower(), value("content")))
        elif element.tag == "link":
            rel = frozenset(value("rel").lower().split())
            links.append(LinkElement(rel, value("type").lower(), value("href")))
        elif value("type").lower() == "application/rsl+xml":
            scripts.append(element.text)
    return PageHead(metas, links, scripts)


def _attribute(element: Any):
    return lambda name: (element.getattr(name) or "")[:MAX_VALUE].strip()
