"""Convert HTML to text, and text to one clean form.

resiliparse finds the main content. DCLM uses it: it is about 8 times as fast as trafilatura, at the
same quality for language models. It does not recognise what documentation tools add (permalink
signs, page navigation, indexes), which is removed here.
"""

import re
import unicodedata

from fastlm.data.nesting import costly_markup
from fastlm.sources.source_files import Document

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
# Soft hyphens, zero-width characters, byte-order marks.
INVISIBLE = re.compile("[\u00ad\u200b\u200c\u2060\ufeff]")
PERMALINKS = ("\u00b6", "\uf0c1")  # signs that remain at the end of a line
OVERSTRIKE = re.compile(r".\x08")  # nroff's bold and underline: glyph, backspace, glyph again
BLANKS = re.compile(r"\n{4,}")
SPACES = re.compile("[\xa0\u2000-\u200a\u202f\u3000]")


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
            html, preserve_formatting=True, main_content=True, list_bullets=True, alt_texts=False,
            links=False, form_fields=False, noscript=False, comments=False, post_meta=False,
            skip_elements=SKIP_ELEMENTS,
        )  # fmt: skip
    except (ValueError, RuntimeError):
        return ""


def normalise(text: str) -> str:
    """Return the text in NFC, with ``\\n`` line ends, plain spaces, no control characters and at
    most two blank lines in a row.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\v", "\n")
    if "\b" in text:
        text = OVERSTRIKE.sub("", text)
    text = CONTROL.sub("", text)
    if not text.isascii():
        text = SPACES.sub(" ", INVISIBLE.sub("", text))
        # last, because the removed characters may have separated marks
        text = unicodedata.normalize("NFC", text)
    text = "\n".join(map(_without_trailing, text.split("\n")))
    return BLANKS.sub("\n\n\n", text).strip("\n")


def _without_trailing(line: str) -> str:
    """Strip blanks and permalinks at the end. Not a regex: ``[ ]+$`` takes quadratic time on a long
    run of spaces followed by a word.
    """
    line = line.rstrip(" \t")
    return line.rstrip(" \t" + "".join(PERMALINKS)) if line.endswith(PERMALINKS) else line


def extract(document: Document) -> str:
    """Return the clean text of a document of either format. Never raises on content."""
    text = document.text
    return normalise(html_to_text(text) if document.meta.get("format") == "html" else text)
