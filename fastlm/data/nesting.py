"""Whether a page is nested so deep that parsing it would take minutes.

What a parser of HTML has to do grows with the depth: a block among 20,000 nested ones costs a walk
over all of them, and unclosed formatting (``<b><i>...``) is built again in every paragraph that
follows. One pass over the tags estimates both. It is an estimate: it does not know which elements
may stand in which, so that a page written against it is bounded only by its size. A process with a
time limit for every page was the alternative; it costs more than the parsing of an ordinary page.
"""

import re
from collections import Counter

# As the standard splits tags, attributes and comments: a ">" or "</div>" within quotes is no tag.
# Possessive throughout: no input makes it go back.
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
# Text up to their own end tag, whatever it looks like
_RAW = {
    name: re.compile(rf"</{name}(?=[ \t\n\f\r/>])|\Z", re.IGNORECASE)
    for name in ("script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes")
}
# Without content, or ended by the next of their kind
_FLAT = frozenset(
    "area base br col embed hr img input link meta param source track wbr html head body p li dt dd"
    " tr td th tbody thead tfoot colgroup option".split()
)  # not rt, rp, optgroup: outside of ruby and select the parser nests them
_FORMATTING = frozenset("a b big code em font i nobr s small strike strong tt u".split())

# Pages are rarely deeper than 30; sloppy ones leave some spans open.
USUAL_DEPTH = 64
# Levels over the usual, of all tags together: 5,000 nested blocks or 0.5 s
MAX_LEVELS = 20_000_000
# Elements with the formatting around each, which may have to be built once more: 3 s and 0.4 GB
MAX_ELEMENTS = 1_000_000
# So few tags can reach neither
FEW_TAGS = 2_000


def costly_markup(html: str) -> str:
    """Why ``html`` is better not parsed, "" for all but hostile and broken pages; linear time."""
    if html.count("<") <= FEW_TAGS:
        return ""
    open_tags: Counter[str] = Counter()
    depth = formatting = levels = elements = at = 0
    while match := _TAG.search(html, at):
        at = match.end()
        end, name = match[1], match[2]
        if name is None:
            continue
        name = name.lower()
        if end:
            if open_tags[name]:  # one that ends nothing is ignored
                open_tags[name] -= 1
                depth -= 1
                formatting -= name in _FORMATTING
            continue
        levels += max(depth - USUAL_DEPTH, 0)
        elements += 1 + formatting
        if levels > MAX_LEVELS:
            return "nested too deep"
        if elements > MAX_ELEMENTS:
            return "too many elements"
        if name in _RAW and not (open_tags["svg"] or open_tags["math"]):  # there they are plain
            found = _RAW[name].search(html, at)
            at = found.start() if found else len(html)
        elif name not in _FLAT:
            open_tags[name] += 1
            depth += 1
            formatting += name in _FORMATTING
    return ""
