"""Keys of documents and paragraphs: texts with equal keys are duplicates.

Both compare normalised text: case and white space are ignored, and in paragraphs punctuation, too.
`fastlm.data.steps` keeps the first occurrence of each key; `fastlm.data.near_duplicates` finds
documents that are nearly equal.
"""

import re
from collections.abc import Container
from hashlib import blake2b

NOT_WORD = re.compile(r"[\W_]+")
PARAGRAPHS = re.compile(r"\n[ \t]*\n")
# Shorter ones ("Parameters", "Example:", "Returns a string.") are repeated legitimately. C4 uses
# three sentences, about 200 bytes.
MIN_PARAGRAPH = 80
# Jaccard similarity of the word 5-grams of documents; here, because options import nothing heavy
THRESHOLD = 0.8


def content_key(text: str) -> bytes:
    """Return 16 bytes of BLAKE2b over the case-folded text with its white space collapsed."""
    return blake2b(
        " ".join(text.casefold().split()).encode("utf-8", "replace"), digest_size=16
    ).digest()


def paragraph_key(paragraph: str) -> int:
    """Return 8 bytes of BLAKE2b over the case-folded words of a paragraph, as a number."""
    bare = NOT_WORD.sub(" ", paragraph.casefold()).strip().encode("utf-8", "replace")
    return int.from_bytes(blake2b(bare, digest_size=8).digest(), "little")


def paragraph_keys(text: str, min_length: int = MIN_PARAGRAPH) -> set[int]:
    """Return the keys of the paragraphs of a text that have ``min_length`` characters or more.

    A paragraph is text between blank lines.
    """
    return {paragraph_key(p) for p in PARAGRAPHS.split(text) if len(p) >= min_length}


def strip_paragraphs(
    text: str, keys: Container[int], min_length: int = MIN_PARAGRAPH
) -> tuple[str, int]:
    """Return (text without the paragraphs that have one of ``keys``, number of them)."""
    paragraphs = PARAGRAPHS.split(text)
    remaining = [p for p in paragraphs if len(p) < min_length or paragraph_key(p) not in keys]
    removed = len(paragraphs) - len(remaining)
    return ("\n\n".join(remaining) if removed else text), removed
