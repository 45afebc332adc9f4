"""Detect pages that are nested so deeply that parsing them would take minutes.

The work of an HTML parser grows with the depth. A block among 20,000 nested ones costs a walk over
all of them, and unclosed formatting (``<b><i>...``) is rebuilt in every paragraph that follows. One
pass over the tags estimates both costs. It is only an estimate: it does not model which elements
may contain which, so a page written to defeat it is bounded only by its size. The alternative was a
process with a time limit for every page; that costs more than parsing an ordinary page.
"""

import re
from collections import defaultdict

# Splits tags, attributes and comments as the standard does: a ">" or "</div>" in quotes is no tag.
# Possessive throughout: no input makes it backtrack.
_SPACE = r"[ \t\n\f\r]"
_TAG = re.compile(
    rf"""<!--(?:>|->|.*?(?:--!?>|\Z))          # a comment
    |<(/?)([a-z][^ \t\n\f\r/>]*+)
     (?:[ \t\n\f\r/]++                         # between attributes
       |[^ \t\n\f\r/>][^ \t\n\f\r/>=]*+        # the name of one, its value
        (?:{_SPACE}*+={_SPACE}*+(?:"[^"]*+"?+|'[^']*+'?+|[^ \t\n\f\r>"'][^ \t\n\f\r>]*+)?+)?+
     )*+""",
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)
# Elements with raw text as content, up to their own end tag
_RAW = {
    name: re.compile(rf"</{name}(?=[ \t\n\f\r/>])|\Z", re.IGNORECASE)
    for name in ("script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes")
}
# Elements without content, or ended by the next one of the same kind
_FLAT = frozenset(
    "area base br col embed hr img input link meta param source track wbr html head body p li dt dd"
    " tr td th tbody thead tfoot colgroup option".split()
)  # not rt, rp, optgroup: outside of ruby and select the parser nests them
_FORMATTING = frozenset("a b big code em font i nobr s small strike strong tt u".split())

# Pages are rarely deeper than 30; sloppy ones leave some spans open.
USUAL_DEPTH = 64
# Levels beyond the usual depth, summed over all tags: 5,000 nested blocks or 0.5 s
MAX_LEVELS = 20_000_000
# Elements plus the formatting around each, which may have to be rebuilt: 3 s and 0.4 GB
MAX_ELEMENTS = 1_000_000
# This many start tags can reach neither limit: n formatting ones count n (n + 1) / 2 elements
FEW_TAGS = 1_400


def costly_markup(html: str) -> str:
    """Return why ``html`` should not be parsed, "" for all but hostile or broken pages; linear
    time.
    """
    if html.count("<") - html.count("</") <= FEW_TAGS:
        return ""
    open_tags: defaultdict[str, int] = defaultdict(int)
    depth = formatting = levels = elements = 0
    tags = _TAG.finditer(html)
    while (match := next(tags, None)) is not None:
        end, name = match.groups()
        if name is None:
            continue
        name = name.lower()
        if end:
            if open_tags[name]:  # an end tag that closes nothing is ignored
                open_tags[name] -= 1
                depth -= 1
                formatting -= name in _FORMATTING
            continue
        if depth > USUAL_DEPTH:
            levels += depth - USUAL_DEPTH
            if levels > MAX_LEVELS:
                return "nested too deep"
        elements += 1 + formatting
        if elements > MAX_ELEMENTS:
            return "too many elements"
        if name in _RAW:
            if not (open_tags["svg"] or open_tags["math"]):  # ordinary tags inside those
                raw_end = _RAW[name].search(html, match.end())
                tags = _TAG.finditer(html, raw_end.start() if raw_end else len(html))
                continue
        elif name in _FLAT:
            continue
        open_tags[name] += 1
        depth += 1
        formatting += name in _FORMATTING
    return ""
