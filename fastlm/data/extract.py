"""Convert HTML to text, and text to one clean form.

``fast``: resiliparse finds the main content (DCLM uses it), without the parts that documentation
tools add and without those that name themselves boilerplate (`fastlm.data.boilerplate`).
``precise``: trafilatura, which is more exact on articles and costs 4 times as much there, 15 times
on documentation.

Rejected: encoding repair by ftfy. It changes none of 1,800 real pages and takes a quarter of the
time.
"""

import logging
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from fastlm.data.boilerplate import (
    boilerplate_classes,
    is_article,
    remove_classes,
    remove_link_paragraphs,
)
from fastlm.data.cpu_limit import CpuLimitReached, call_with_cpu_limit
from fastlm.data.nesting import costly_markup
from fastlm.errors import InputError, check_type
from fastlm.sources.source_files import Document, decode_web

METHODS = ("fast", "precise")
# What `extract_page` reports beside the reasons of `costly_markup`
CPU_LIMIT, TOO_LARGE = "limit of CPU time", "too large for precise"
# CPU time of trafilatura for one page. It takes 1.4 s per MiB of real documentation, so only a page
# that costs more than linear time reaches the limit, however busy the machine.
PRECISE_SECONDS = 10.0
MAX_PRECISE_LENGTH = 1 << 20  # characters; a longer page is extracted by "fast"

# Permalinks, page navigation, language bars and indexes that Sphinx, DocBook, AsciiDoc, Doxygen,
# Drupal and Apache pages have inside what is detected as the main content.
SKIP_ELEMENTS = [
    "nav", "footer", "button", "select", "a.headerlink", "a.anchor", "a.id_link", "a.viewcode-back",
    "span.viewcode-link", "div.navheader", "div.navfooter", "div.related", "div.toc", "div#toc",
    "div.sphinxsidebar", "div.nav", "div.navigation", "div.breadcrumbs", "div.header-nav",
    "div.book-navigation", "div.toplang", "div.bottomlang", "div#path", "div#page-header",
    "div#quickview", "div.tagline", "div#footer", "div#footer-text", "table.navigation",
    "ul.docnav",
    "div.topnav", "div.bottomnav", "div.legalnotice", "div.index", "div.indextable",
    "table.indextable", "span.linenos", "td.linenos",
]  # fmt: skip

CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]|[\ud800-\udfff]")
CONTROL_BYTES = bytes(c for c in range(128) if CONTROL.match(chr(c)))
# Soft hyphens, zero-width characters, byte-order marks.
INVISIBLE = re.compile("[\u00ad\u200b\u200c\u2060\ufeff]")
PERMALINKS = ("\u00b6", "\uf0c1")  # signs that remain at the end of a line
LINE_ENDS = (" \n", "\t\n", *PERMALINKS)
OVERSTRIKE = re.compile(r".\x08")  # nroff's bold and underline: glyph, backspace, glyph again
BLANKS = re.compile(r"\n{4,}")
SPACES = re.compile("[\xa0\u2000-\u200a\u202f\u3000]")


@dataclass(frozen=True, slots=True)
class Extraction:
    """The clean text of a document, and why it was not extracted as asked ("" if it was): the text
    is then that of "fast", or "" if the page is too costly to parse.
    """

    text: str
    reason: str = ""


def main_text(html: bytes | str) -> str:
    """Return the main content of a page as clean text; paragraphs, lists, code blocks and tables
    are preserved, titles too.

    The encoding of bytes is detected. Return "" if the page has no text or would take minutes to
    parse (`fastlm.data.nesting`). Never raises on content. InputError: neither text nor bytes.
    """
    check_type(html, "html", (str, bytes), "a page as text or bytes")
    return normalise(html_to_text(_decode(html)))


def precise_text(html: bytes | str, *, seconds: float = PRECISE_SECONDS) -> Extraction:
    """Return the main content of a page as trafilatura finds it, favouring precision.

    The text is that of `main_text` if trafilatura finds none, and with a reason if it takes more
    than ``seconds`` of CPU time (`CPU_LIMIT`) or the page is longer than MAX_PRECISE_LENGTH
    (`TOO_LARGE`). InputError: trafilatura is not installed.
    """
    check_type(html, "html", (str, bytes), "a page as text or bytes")
    trafilatura = _trafilatura()
    html = _decode(html)
    if reason := costly_markup(html):
        return Extraction("", reason)
    if len(html) > MAX_PRECISE_LENGTH:
        return Extraction(main_text(html), TOO_LARGE)
    try:
        text = call_with_cpu_limit(
            lambda: trafilatura.extract(html, favor_precision=True, include_comments=False), seconds
        )
    except CpuLimitReached:
        return Extraction(main_text(html), CPU_LIMIT)
    except Exception:  # of lxml and of trafilatura, on malformed pages
        text = None
    return Extraction(normalise(text) if text else main_text(html))


def html_to_text(html: str) -> str:
    """Return the main content of a page as plain text; paragraphs and code blocks are preserved.

    Return "" if the parser gives up or would take minutes (`costly_markup`). A bulleted list
    directly below <body> or <main> is treated as navigation.
    """
    from resiliparse.extract.html2text import extract_plain_text

    if costly_markup(html):
        return ""
    try:
        return extract_plain_text(
            _content(html), preserve_formatting=True, main_content=True, list_bullets=True,
            alt_texts=False, links=False, form_fields=False, noscript=False, comments=False,
            post_meta=False, skip_elements=SKIP_ELEMENTS,
        )  # fmt: skip
    except (ValueError, RuntimeError):
        return ""


def _content(html: str) -> Any:
    """Return the page without boilerplate, as a tree, or ``html`` itself if it has none. Most pages
    of documentation have none.

    Tables and code in figures, as WordPress and Hugo write them, are moved out of them, and the
    class of quoted posts is removed. resiliparse takes the former for pictures, the latter for
    share buttons.
    """
    classes, article = boilerplate_classes(html), is_article(html)
    figures = "<figure" in html and ("<table" in html or "<pre" in html)
    quotes = "twitter-tweet" in html
    if not (classes or article or figures or quotes):
        return html

    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(html)
    body: Any = tree.body
    if body is None:
        return tree
    if classes:
        remove_classes(body, classes)
    if article:
        remove_link_paragraphs(body)
    if figures:
        for content in body.query_selector_all("figure > table, figure > pre").values():
            figure: Any = content.parent
            figure.parent.insert_before(content, figure)
    if quotes:
        for quote in body.query_selector_all("blockquote.twitter-tweet").values():
            quote.remove_attribute("class")
    return tree


def _decode(html: bytes | str) -> str:
    return html if isinstance(html, str) else decode_web(html, html=True)


def check_method(how: str) -> None:
    """Raise InputError on an unknown method, or if its package is not installed."""
    if how not in METHODS:
        raise InputError(f"extract: expected {' or '.join(METHODS)}, got {how!r}")
    if how == "precise" and find_spec("trafilatura") is None:
        _trafilatura()


@cache
def _trafilatura() -> Any:
    try:
        import trafilatura
    except ImportError:
        raise InputError(
            "extract: expected the package trafilatura for 'precise'; pip install 'fastlm[data]'"
        ) from None
    # it reports each page without text; the text is counted by the caller
    logging.getLogger("trafilatura").addHandler(logging.NullHandler())
    return trafilatura


def normalise(text: str) -> str:
    """Return the text in NFC, with ``\\n`` line ends, plain spaces, no control characters and at
    most two blank lines in a row.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\v", "\n")
    if "\b" in text:
        text = OVERSTRIKE.sub("", text)
    if text.isascii():  # four times as fast as the pattern
        text = text.encode().translate(None, CONTROL_BYTES).decode()
    else:
        text = SPACES.sub(" ", INVISIBLE.sub("", CONTROL.sub("", text)))
        # last, because the removed characters may have separated marks
        text = unicodedata.normalize("NFC", text)
    if any(end in text for end in LINE_ENDS) or text.endswith((" ", "\t")):
        text = "\n".join(map(_without_trailing, text.split("\n")))
    if "\n\n\n\n" in text:
        text = BLANKS.sub("\n\n\n", text)
    return text.strip("\n")


def _without_trailing(line: str) -> str:
    """Strip blanks and permalinks at the end. Not a regex: ``[ ]+$`` takes quadratic time on a long
    run of spaces followed by a word.
    """
    line = line.rstrip(" \t")
    return line.rstrip(" \t" + "".join(PERMALINKS)) if line.endswith(PERMALINKS) else line


def extract(document: Document, how: str = "fast") -> str:
    """Return the clean text of a document of either format. Never raises on content."""
    return extract_page(document, how).text


def extract_page(document: Document, how: str = "fast") -> Extraction:
    """Return the clean text of a document of either format, and the reason if it was not extracted
    as asked. ``how`` is "fast" or "precise"; InputError if it is another, or trafilatura is not
    installed.
    """
    if how not in METHODS:
        check_method(how)
    if document.meta.get("format") != "html":
        return Extraction(normalise(document.text))
    if how == "precise":
        return precise_text(document.text)
    text = main_text(document.text)
    return Extraction(text, "" if text else costly_markup(document.text))
