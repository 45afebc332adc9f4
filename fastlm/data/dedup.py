"""Exact streaming de-duplication of whole documents, and of paragraphs that recur in other
documents.

Both compare normalised text: case and white space are ignored, and in paragraphs punctuation, too.
Both keep the first occurrence and store a key of 16 bytes per document and 8 bytes per paragraph.
That takes about 100 bytes of memory per document and 60 per paragraph. Near duplicates (MinHash)
are not detected.
"""

import re
from hashlib import blake2b

NOT_WORD = re.compile(r"[\W_]+")
PARAGRAPHS = re.compile(r"\n[ \t]*\n")
# Shorter ones ("Parameters", "Example:", "Returns a string.") are repeated legitimately. C4 uses
# three sentences, about 200 bytes.
MIN_PARAGRAPH = 80


def content_key(text: str) -> bytes:
    """Return 16 bytes of BLAKE2b over the case-folded text with its white space collapsed."""
    return blake2b(
        " ".join(text.casefold().split()).encode("utf-8", "replace"), digest_size=16
    ).digest()


def paragraph_key(paragraph: str) -> int:
    """Return 8 bytes of BLAKE2b over the case-folded words of a paragraph, as a number."""
    bare = NOT_WORD.sub(" ", paragraph.casefold()).strip().encode("utf-8", "replace")
    return int.from_bytes(blake2b(bare, digest_size=8).digest(), "little")


class DocumentDedup:
    """``is_new(key)`` returns True for a content that has not been seen before."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, key: bytes) -> bool:
        before = len(self._seen)
        self._seen.add(key)
        return len(self._seen) > before


class ParagraphDedup:
    """``strip(text)`` removes paragraphs that occur in an earlier document. Repeats within one
    document stay.

    A paragraph is text between blank lines, of MIN_PARAGRAPH characters or more.
    """

    def __init__(self, min_length: int = MIN_PARAGRAPH) -> None:
        self.min_length = min_length
        self._seen: set[int] = set()

    def strip(self, text: str) -> tuple[str, int]:
        """Return (text without repeated paragraphs, number of paragraphs removed)."""
        remaining, new_keys, removed = [], set(), 0
        for paragraph in PARAGRAPHS.split(text):
            if len(paragraph) >= self.min_length:
                key = paragraph_key(paragraph)
                if key in self._seen:
                    removed += 1
                    continue
                new_keys.add(key)
            remaining.append(paragraph)
        self._seen |= new_keys
        return ("\n\n".join(remaining) if removed else text), removed
