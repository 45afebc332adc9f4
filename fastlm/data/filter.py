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

The rules count words, as the papers do for English. ``stop_words`` needs a list of the text's
language (`stop_words.toml`), and lets texts of other languages pass. Languages without spaces
between words (`CHARACTERS_PER_WORD`) have their words estimated from their letters, and
``mean_word_length`` lets them pass, because nothing marks the length of a word there.

Rejected: Gopher's repeated n-grams. They cost more than all the others, and code repeats itself
legitimately. Also rejected: segmenting Chinese, Japanese or Thai into words. It needs a dictionary
per language and takes longer than all rules together, and only the number of words is needed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from fastlm.errors import InputError
from fastlm.schema import read_toml

# Letters, with combining signs, for a word of the same page in English (libreoffice-help, 150 pages
# each: zh 2.5, ja 3.3, km 4.8); those not measured as Khmer
CHARACTERS_PER_WORD = {"zh": 2.5, "ja": 3, "km": 5, "th": 5, "lo": 5, "my": 5, "dz": 5, "bo": 5}
BULLETS = ("•", "‣", "●", "◦", "▪", "-", "*", "·")
# the last eight end sentences in Chinese, Japanese, Hindi, Arabic, Urdu, Burmese, Khmer, Armenian
ENDINGS = (
    ".", "!", "?", '"', "'", "\u201d", "\u2019", ":", ";", "\u3002", "\uff01", "\uff1f", "\u0964",
    "\u061f", "\u06d4", "\u104b", "\u17d4", "\u0589",
)  # fmt: skip
MIN_WORDS, MAX_WORDS = 50, 100_000
HAS_LETTER = re.compile(r"[^\W\d_]")
# Thai to Tibetan, Burmese, Khmer, Chinese and Japanese
WITHOUT_SPACES = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff]")
IN_WORDS = re.compile(r"\w|[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff]")  # vowel signs are no \w


@dataclass
class TextStatistics:
    """A text with its words and lines, which are split only once. ``language`` is a code of
    `fastlm.data.language`.
    """

    text: str
    language: str = "en"

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def word_count(self) -> int:
        """The number of words; estimated in a language without spaces between them."""
        per_word = CHARACTERS_PER_WORD.get(self.language)
        if per_word is None or not WITHOUT_SPACES.search(self.text):
            return len(self.words)
        return max(len(self.words), int(len(IN_WORDS.findall(self.text)) / per_word))

    @cached_property
    def lines(self) -> list[str]:
        return [s for line in self.text.split("\n") if (s := line.strip())]


@cache
def load_stop_words() -> dict[str, frozenset[str]]:
    """Return the lists of common words, by language."""
    table, _ = read_toml(Path(__file__).with_name("stop_words.toml"))
    return {language: frozenset(words.split()) for language, words in table["words"].items()}


def word_count(s: TextStatistics, min_words: int = MIN_WORDS, max_words: int = MAX_WORDS) -> bool:
    """Gopher: between 50 and 100,000 words."""
    return min_words <= s.word_count <= max_words


def mean_word_length(s: TextStatistics, min_mean: float = 3.0, max_mean: float = 10.0) -> bool:
    """Gopher: the mean word is 3 to 10 characters long. Not in languages without spaces."""
    if s.language in CHARACTERS_PER_WORD:
        return True
    n = len(s.words)
    return n > 0 and min_mean <= sum(map(len, s.words)) / n <= max_mean


def symbol_ratio(s: TextStatistics, max_ratio: float = 0.1) -> bool:
    """Gopher: at most 0.1 hash signs, and at most 0.1 ellipses, per word."""
    limit = max_ratio * s.word_count
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
    """Gopher: at least two common words of the language: the, be, to, of, and, that, have, with.
    Languages without a list pass.
    """
    common = load_stop_words().get(s.language)
    if common is None:
        return True
    present = set()
    for word in s.words:
        if word.lower() in common:
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


def first_failed(text: str, rules: Sequence[str] = TECHNICAL, language: str = "en") -> str | None:
    """Return the name of the first rule that rejects the text, None if all keep it.

    ``language`` is a code of `fastlm.data.language`. "und" and languages that no rule knows are
    counted in words between spaces, without a list of common words.
    """
    statistics = TextStatistics(text, language)
    return next((name for name in rules if not RULES[name](statistics)), None)


def is_too_short(text: str, rules: Sequence[str]) -> bool:
    """Return whether `first_failed` rejects a text as too short, whatever its language is. Half of
    the pages of a manual are, and their language need not be identified.
    """
    if not rules or rules[0] != word_count.__name__:
        return False
    return not WITHOUT_SPACES.search(text) and len(text.split()) < MIN_WORDS
