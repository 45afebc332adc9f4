"""Published quality rules, each a small pure function that returns True for a good document.

Gopher: Rae et al. 2021, arXiv 2112.11446, appendix A.1.1 and its table of repetitions. C4: Raffel
et al. 2019, arXiv 1910.10683, section 2.2. FineWeb: Penedo et al. 2024, arXiv 2406.17557, section
3.6. The thresholds are the papers'.

``WEB`` contains all rules; ``TECHNICAL``, the default, contains those that suit manuals. Reference
pages consist of short lines, lists, signatures and braces. C4's brace rule and FineWeb's line rules
were written for news and blogs and reject such pages as junk. Two of the Gopher rules do the same:
the share of words with a letter rejected the grammar of Python and the PostgreSQL catalogue, and
the share of repeated lines rejected argparse and a Shakespeare play (closing brackets, names of
speakers). Gopher's limit on repeated characters covers repetition there instead.

Rejected: Gopher's repeated n-grams. They cost more than all the others, and code repeats itself
legitimately.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fastlm.errors import InputError

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("•", "‣", "●", "◦", "▪", "-", "*", "·")
ENDINGS = (".", "!", "?", '"', "'", "\u201d", "\u2019", ":", ";", "\u3002")
MAX_WORDS = 100_000
HAS_LETTER = re.compile(r"[^\W\d_]")


@dataclass
class TextStatistics:
    """A text with its words and lines, which are split only once."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        return [s for line in self.text.split("\n") if (s := line.strip())]


def word_count(s: TextStatistics, min_words: int = 50, max_words: int = MAX_WORDS) -> bool:
    """Gopher: between 50 and 100,000 words."""
    return min_words <= len(s.words) <= max_words


def mean_word_length(s: TextStatistics, min_mean: float = 3.0, max_mean: float = 10.0) -> bool:
    """Gopher: the mean word is 3 to 10 characters long."""
    n = len(s.words)
    return n > 0 and min_mean <= sum(map(len, s.words)) / n <= max_mean


def symbol_ratio(s: TextStatistics, max_ratio: float = 0.1) -> bool:
    """Gopher: at most 0.1 hash signs, and at most 0.1 ellipses, per word."""
    limit = max_ratio * len(s.words)
    return s.text.count("#") <= limit and s.text.count("...") + s.text.count("…") <= limit


def bullet_lines(s: TextStatistics, max_share: float = 0.9) -> bool:
    """Gopher: at most 90 % of the lines start with a bullet."""
    return sum(line.startswith(BULLETS) for line in s.lines) <= max_share * len(s.lines)


def ellipsis_lines(s: TextStatistics, max_share: float = 0.3) -> bool:
    """Gopher: at most 30 % of the lines end with an ellipsis."""
    return sum(line.endswith(("...", "…")) for line in s.lines) <= max_share * len(s.lines)


def alphabetic_words(s: TextStatistics, min_share: float = 0.8) -> bool:
    """Gopher: at least 80 % of the words contain a letter."""
    # islower and isupper settle nearly all words at a tenth of the regex's cost
    letters = sum(w.islower() or w.isupper() or HAS_LETTER.search(w) is not None for w in s.words)
    return letters >= min_share * len(s.words)


def stop_words(s: TextStatistics, min_count: int = 2) -> bool:
    """Gopher: at least two of the, be, to, of, and, that, have, with. English only."""
    present = set()
    for word in s.words:
        if word.lower() in STOP_WORDS:
            present.add(word.lower())
            if len(present) >= min_count:
                return True
    return len(present) >= min_count


def duplicate_lines(s: TextStatistics, max_share: float = 0.3) -> bool:
    """Gopher: at most 30 % of the lines repeat another line of the document."""
    return len(s.lines) - len(set(s.lines)) <= max_share * len(s.lines)


def repeated_characters(s: TextStatistics, max_share: float = 0.2) -> bool:
    """Gopher: at most 20 % of the characters are in lines that repeat another line."""
    total = sum(map(len, s.lines))
    return total - sum(map(len, set(s.lines))) <= max_share * total


def lorem_ipsum(s: TextStatistics) -> bool:
    """C4: no placeholder text."""
    return "lorem ipsum" not in s.text.lower()


def curly_brace(s: TextStatistics) -> bool:
    """C4: no curly brace, taken as a sign of code."""
    return "{" not in s.text


def sentence_lines(s: TextStatistics, min_share: float = 0.12) -> bool:
    """FineWeb: more than 12 % of the lines end with punctuation."""
    return sum(line.endswith(ENDINGS) for line in s.lines) > min_share * len(s.lines)


def duplicate_line_characters(s: TextStatistics, max_share: float = 0.1) -> bool:
    """FineWeb: less than 10 % of the characters are in lines that repeat another line."""
    total = sum(map(len, s.lines))
    return total - sum(map(len, set(s.lines))) < max_share * total


def short_lines(s: TextStatistics, max_share: float = 0.67, length: int = 30) -> bool:
    """FineWeb: less than 67 % of the lines are shorter than 30 characters."""
    return sum(len(line) < length for line in s.lines) < max_share * len(s.lines)


RULES: dict[str, Callable[[TextStatistics], bool]] = {
    f.__name__: f
    for f in (
        word_count, mean_word_length, symbol_ratio, bullet_lines, ellipsis_lines, alphabetic_words,
        stop_words, duplicate_lines, repeated_characters, lorem_ipsum, curly_brace, sentence_lines,
        duplicate_line_characters, short_lines,
    )
}  # fmt: skip
WEB = tuple(RULES)
NOT_TECHNICAL = frozenset({
    "alphabetic_words", "duplicate_lines", "curly_brace", "sentence_lines",
    "duplicate_line_characters", "short_lines",
})  # fmt: skip
TECHNICAL = tuple(r for r in WEB if r not in NOT_TECHNICAL)


def check_rules(names: Sequence[str]) -> None:
    """Raise InputError on an unknown rule."""
    for name in names:
        if name not in RULES:
            raise InputError(f"rules: expected some of {', '.join(RULES)}; got {name!r}")


def first_failed(text: str, rules: Sequence[str] = TECHNICAL) -> str | None:
    """Return the name of the first rule that rejects the text, None if all keep it."""
    statistics = TextStatistics(text)
    return next((name for name in rules if not RULES[name](statistics)), None)
