"""Remove what is not the text of a page from its tree: captions, related articles, share bars.

Most sites name these parts in the classes of their elements (``related-articles``, ``shareBar``).
One search through the markup finds the classes; only those with a word of `WORDS` are looked up in
the tree, so a page of documentation costs one search. An element that holds most of the paragraphs
is kept whatever its name is.

Rejected: to remove headings that are links (F1 +0.001 on the half of the labelled articles that the
rules were tuned on, -0.002 on the other); words in ids (documentation names its sections in them);
CSS selectors such as ``[class*=related]`` (0.04 ms each and page, and no borders of words).
"""

import re
from functools import cached_property, lru_cache
from typing import Any

# A word between hyphens, underscores and capitals of a class
WORDS = frozenset(
    """
    advert advertisement avatar banner bio biography breadcrumb breadcrumbs byline caption captions
    carousel comments cookie cookies credit credits cta disclaimer disclosure disqus gallery gdpr
    infobar newsletter newsletters outbrain paywall playlist popular popup popups promo promoted
    promos readmore recirc recirculation recommendations recommended related share shares sharing
    signup slideshow sponsored subscribe subscription taboola tagline trending
    """.split()
)
# First words that turn the meaning (``no-comments``) or name a topic (``tag-share``)
NEUTRAL = frozenset(("category", "has", "is", "no", "tag", "with", "without"))
# Bootstrap's name for what is only printed or read aloud, unless it is shown on some screens
HIDDEN = re.compile(r"(?:^|\s)d-none(?:\s|$)(?!.*\bd-(?:sm|md|lg|xl|xxl)-)")
# Sphinx's captions of code, tables and lists of pages
DOCUMENTATION = frozenset((("p", "caption"), ("span", "caption-text"), ("span", "caption-number")))
CODE_CAPTION = "code-block-caption"
# On every page of Sphinx, where fastlm.data.extract skips it
SKIPPED = "related"
WRAPPERS = frozenset(("html", "body", "main", "article"))
MAX_CLASS = 300  # characters; longer values are data
MAX_CLASSES = 64  # different values looked up; the 91 labelled pages have at most 60
# Elements kept because they hold most of the page. More than a few are nested wrappers of an
# unusual or hostile page, each of which costs a walk over its content.
MAX_KEPT = 8

# Metadata of pages that hold one article, where a paragraph that is one link leads elsewhere
ARTICLE = ('content="article"', "NewsArticle", "BlogPosting")  # Open Graph, schema.org
# Before a link, in any case: no sentence starts so. English; other languages have only the links.
LABEL = re.compile(
    r"(?:related|read more|read next|see also|see more|also read|also|more|must read|don.t miss"
    r"|recommended|watch|listen|up next|click here)\b\W",
    re.IGNORECASE,
)
MAX_LINK_PARAGRAPH = 300  # characters
MIN_LINK_WORDS = 4  # fewer may be a term or an address
MAX_LINK_SHARE = 0.2  # of the text in paragraphs: with more, the links are what the page is about

_CLASS = re.compile(r"""class=("[^"<>]*|'[^'<>]*|[^\s"'<>]+)""")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@lru_cache(maxsize=1 << 14)  # a site repeats its classes on every page
def is_boilerplate(classes: str) -> bool:
    """Return True if the value of a ``class`` attribute names a part that is not text."""
    if classes == SKIPPED:
        return False
    for name in classes.split():
        words = [word.lower() for word in _WORD.findall(name)]
        if words and words[0] not in NEUTRAL and not WORDS.isdisjoint(words):
            return name != CODE_CAPTION
    return bool(HIDDEN.search(classes))


def boilerplate_classes(html: str) -> list[str]:
    """Return the values of ``class`` attributes that name a part that is not text, sorted; at most
    MAX_CLASSES.
    """
    values = {value.lstrip("\"'") for value in set(_CLASS.findall(html)) if len(value) <= MAX_CLASS}
    names = [v for v in values if is_boilerplate(v) and v.isprintable() and "\\" not in v]
    return sorted(names)[:MAX_CLASSES]


def is_article(html: str) -> bool:
    """Return True if the page says that it holds one article."""
    return any(sign in html for sign in ARTICLE)


def remove_classes(body: Any, classes: list[str]) -> None:
    """Remove the elements below ``body`` whose ``class`` is one of ``classes``, unless they hold
    most of the page; linear time.
    """
    quoted = (f"""[class='{c}']""" if '"' in c else f'[class="{c}"]' for c in classes)
    page, num_kept, removed = _Page(body), 0, None
    for node in body.query_selector_all(",".join(quoted)).values():  # in document order
        if removed is not None and removed.contains(node):
            continue
        if node.tag in WRAPPERS or (node.tag, node.class_name) in DOCUMENTATION:
            continue
        if not page.is_mostly(node):
            node.remove()
            removed = node
        else:
            num_kept += 1
            if num_kept > MAX_KEPT:
                return


class _Page:
    """The amount of text of a page before anything is removed, measured when it is needed."""

    def __init__(self, body: Any) -> None:
        self.body = body

    @cached_property
    def has_paragraphs(self) -> bool:
        return self.body.query_selector("p") is not None

    @cached_property
    def paragraph_length(self) -> int:
        return _paragraph_length(self.body)

    @cached_property
    def length(self) -> int:
        return len(self.body.text)

    def is_mostly(self, node: Any) -> bool:
        """Return True if ``node`` holds more than half of the text in paragraphs, or of all text if
        there are none.
        """
        if not self.has_paragraphs:
            return 2 * len(node.text) > self.length
        length = _paragraph_length(node)
        return length > 0 and 2 * length > self.paragraph_length


def _paragraph_length(node: Any) -> int:
    return sum(len(p.text) for p in node.query_selector_all("p").values())


def remove_link_paragraphs(body: Any) -> None:
    """Remove paragraphs that are one link to another page, or a label and a link; linear time."""
    if body.query_selector("p p") is not None:  # invalid; the walks below could take quadratic time
        return
    total, removable = 0, []
    for paragraph in body.query_selector_all("p").values():
        text = paragraph.text.strip()
        total += len(text)
        if not 0 < len(text) <= MAX_LINK_PARAGRAPH or paragraph.parent.tag in ("li", "td", "th"):
            continue
        links = sum(len(a.text) for a in paragraph.query_selector_all("a").values())
        is_link = links >= 0.9 * len(text) and len(text.split()) >= MIN_LINK_WORDS
        if is_link or (links >= 0.5 * len(text) and LABEL.match(text)):
            removable.append((paragraph, len(text)))
    if sum(length for _, length in removable) <= MAX_LINK_SHARE * total:
        for paragraph, _ in removable:
            paragraph.remove()
