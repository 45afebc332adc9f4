"""Rules that an answer may be asked to follow and that a program checks, in the manner of IFEval
(Zhou et al. 2023, arXiv:2311.07911). Wording and prompts are fastlm's own.
"""

import json
import random
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Arguments = Mapping[str, Any]
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_SENTENCE = re.compile(r"[^.!?]*\w[^.!?]*[.!?]+(?=\s|$|[\"'\u201d])")
_BULLET = re.compile(r"^\s*[*-]\s+\S", re.M)
_NUMBERED = re.compile(r"^\s*\d+[.)]\s+\S", re.M)
_MARKED = re.compile(r"(?<!\*)\*{1,2}[^*\n]+\*{1,2}(?!\*)")
_WORDS = "ocean bridge silver winter market garden engine letter window forest".split()
_SCRIPTS = {"CYRILLIC": "Russian", "GREEK": "Greek", "HIRAGANA": "Japanese hiragana"}


@dataclass(frozen=True)
class Rule:
    """A kind of rule.

    draw: its arguments, at random; ``topic`` is what the answer is about.
    ask: the sentence that asks for it.
    followed: whether an answer follows it.
    group: rules of one group contradict each other; those of "alone" contradict any other.
    """

    group: str
    draw: Callable[[random.Random, str], Arguments]
    ask: Callable[[Arguments], str]
    followed: Callable[[str, Arguments], bool]


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def _count(low: int, high: int, step: int = 1) -> Callable[[random.Random, str], Arguments]:
    return lambda rng, topic: {"n": rng.randrange(low, high + 1, step)}


def _nothing(rng: random.Random, topic: str) -> Arguments:
    return {}


def _times(text: str, word: str) -> int:
    return sum(one.casefold() == word.casefold() for one in words(text))


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def _json(text: str) -> bool:
    body = text.strip()
    if fenced := re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", body, re.S):
        body = fenced[1]
    try:
        return isinstance(json.loads(body), dict | list)
    except (ValueError, RecursionError):
        return False


def _script(text: str, name: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return bool(letters) and all(name in unicodedata.name(c, "") for c in letters)


def _two(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _cased(text: str, upper: bool) -> bool:
    return any(c.isalpha() for c in text) and text == (text.upper() if upper else text.lower())


RULES: dict[str, Rule] = {
    "words at least": Rule(
        "length", _count(40, 120, 20), lambda a: f"Write at least {a['n']} words.",
        lambda t, a: len(words(t)) >= a["n"],
    ),
    "words at most": Rule(
        "length", _count(20, 60, 10), lambda a: f"Write at most {a['n']} words.",
        lambda t, a: 0 < len(words(t)) <= a["n"],
    ),
    "sentences": Rule(
        "length", _count(2, 5), lambda a: f"Write exactly {a['n']} sentences.",
        lambda t, a: len(_SENTENCE.findall(t)) == a["n"],
    ),
    "sentences at most": Rule(
        "length", _count(2, 4), lambda a: f"Write no more than {a['n']} sentences.",
        lambda t, a: 0 < len(_SENTENCE.findall(t)) <= a["n"],
    ),
    "paragraphs": Rule(
        "shape", _count(2, 4), lambda a: f"Write {a['n']} paragraphs, with an empty line between.",
        lambda t, a: len(_paragraphs(t)) == a["n"],
    ),
    "bullets": Rule(
        "shape", _count(3, 6), lambda a: f"Give exactly {a['n']} bullet points, each after '* '.",
        lambda t, a: len(_BULLET.findall(t)) == a["n"],
    ),
    "numbered": Rule(
        "shape", _count(3, 6), lambda a: f"Give a list of exactly {a['n']} items, numbered '1.'.",
        lambda t, a: len(_NUMBERED.findall(t)) == a["n"],
    ),
    "sections": Rule(
        "shape", _count(2, 3),
        lambda a: f"Write {a['n']} sections that begin with 'Section 1', 'Section 2' and so on.",
        lambda t, a: re.findall(r"^\W*Section (\d+)", t, re.M) == [
            str(i + 1) for i in range(a["n"])
        ],
    ),
    "two answers": Rule(
        "shape", _nothing, lambda a: "Give two different answers, with ****** between them.",
        lambda t, a: _two(t),
    ),
    "title": Rule(
        "title", _nothing, lambda a: "Begin with a title in double angle brackets: <<title>>.",
        lambda t, a: re.match(r"\s*<<[^<>\n]*\w[^<>\n]*>>", t) is not None,
    ),
    "keywords": Rule(
        "words", lambda rng, topic: {"words": rng.sample(_WORDS, 2)},
        lambda a: f"Use the words '{a['words'][0]}' and '{a['words'][1]}'.",
        lambda t, a: all(_times(t, word) for word in a["words"]),
    ),
    "keyword count": Rule(
        "words", lambda rng, topic: {"word": rng.choice(_WORDS), "n": rng.randint(2, 4)},
        lambda a: f"Use the word '{a['word']}' at least {a['n']} times.",
        lambda t, a: _times(t, a["word"]) >= a["n"],
    ),
    "forbidden word": Rule(
        "forbidden", lambda rng, topic: {"word": rng.choice(("the", "and", "is", "very", "it"))},
        lambda a: f"Do not use the word '{a['word']}'.",
        lambda t, a: bool(words(t)) and not _times(t, a["word"]),
    ),
    "letter count": Rule(
        "letters", lambda rng, topic: {"letter": rng.choice("bfgkvw"), "n": rng.randint(4, 9)},
        lambda a: f"Let the letter '{a['letter']}' occur at least {a['n']} times.",
        lambda t, a: t.lower().count(a["letter"]) >= a["n"],
    ),
    "lower case": Rule(
        "alone", _nothing, lambda a: "Write in lower case only, without any capital letter.",
        lambda t, a: _cased(t, upper=False),
    ),
    "upper case": Rule(
        "alone", _nothing, lambda a: "WRITE IN CAPITAL LETTERS ONLY.",
        lambda t, a: _cased(t, upper=True),
    ),
    "capital words": Rule(
        "capitals", _count(2, 5), lambda a: f"Write at least {a['n']} words in capital letters.",
        lambda t, a: sum(w.isupper() and len(w) > 1 for w in words(t)) >= a["n"],
    ),
    "script": Rule(
        "alone", lambda rng, topic: {"script": rng.choice(sorted(_SCRIPTS))},
        lambda a: f"Write only in {_SCRIPTS[a['script']]}, in its own letters and in no others.",
        lambda t, a: _script(t, a["script"]),
    ),
    "json": Rule(
        "alone", _nothing, lambda a: "Write the whole answer as JSON, and nothing else.",
        lambda t, a: _json(t),
    ),
    "begins with": Rule(
        "begin", lambda rng, topic: {"text": rng.choice(("Dear reader", "In short", "Let us see"))},
        lambda a: f"Begin with the words '{a['text']}'.",
        lambda t, a: t.lstrip().startswith(a["text"]),
    ),
    "ends with": Rule(
        "end",
        lambda rng, topic: {"text": rng.choice(("That is all.", "Any questions?", "The end."))},
        lambda a: f"End with the exact words '{a['text']}' and write nothing after them.",
        lambda t, a: t.rstrip().endswith(a["text"]),
    ),
    "postscript": Rule(
        "end", _nothing, lambda a: "Add a postscript at the end that begins with P.S.",
        lambda t, a: re.search(r"^\s*P\.\s?S\.\s*\S", t, re.M) is not None,
    ),
    "no commas": Rule(
        "commas", _nothing, lambda a: "Do not use any comma.",
        lambda t, a: bool(words(t)) and "," not in t,
    ),
    "no digits": Rule(
        "digits", _nothing, lambda a: "Do not use any digit.",
        lambda t, a: bool(words(t)) and not any(c.isdigit() for c in t),
    ),
    "highlights": Rule(
        "marks", _count(2, 4), lambda a: f"Mark at least {a['n']} parts with asterisks: *part*.",
        lambda t, a: len(_MARKED.findall(t)) >= a["n"],
    ),
    "placeholders": Rule(
        "places", _count(2, 4),
        lambda a: f"Leave at least {a['n']} placeholders in square brackets, such as [name].",
        lambda t, a: len(re.findall(r"\[[^\[\]\n]+\]", t)) >= a["n"],
    ),
    "quoted": Rule(
        "alone", _nothing, lambda a: "Put the whole answer in double quotation marks.",
        lambda t, a: len(t.strip()) > 2 and t.strip()[0] == t.strip()[-1] == '"',
    ),
    "repeat": Rule(
        "alone", lambda rng, topic: {"text": topic},
        lambda a: "First repeat the sentence above word for word, then answer it.",
        lambda t, a: t.lstrip().startswith(a["text"])
        and bool(words(t.lstrip()[len(a["text"]) :])),
    ),
    "choice": Rule(
        "alone", _nothing,
        lambda a: "Whatever you think of it, answer with one word only: yes, no or maybe.",
        lambda t, a: t.strip().rstrip(".!").lower() in ("yes", "no", "maybe"),
    ),
}  # fmt: skip
