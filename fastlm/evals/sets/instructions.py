"""Instructions with rules that a program checks, as in IFEval (Zhou et al. 2023,
arXiv:2311.07911). Wording and prompts are fastlm's own.

Each kind of rule has five prompts: three with this rule only, one with a second rule, one with a
third. The metric ``strict`` is 1 where an answer follows all its rules. ``loose`` also accepts an
answer that follows them without its first line, its last line, or its asterisks (IFEval's loose
accuracy). ``rule_accuracy`` is the share of the rules that an answer follows.
"""

import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.evals.answers import Row, per_answer
from fastlm.evals.task import OpenQuestion, TaskSpec

EXTRA_RULES = (0, 0, 0, 1, 2)  # in the five prompts of a kind
TOKENS = 256
TOPICS = (
    "Describe a city that you would like to visit.", "Explain why the sky is blue.",
    "Write about a friend who learns to cook.", "Explain how to plant a tree.",
    "Describe the perfect breakfast.", "Write a note that invites a colleague to lunch.",
    "Explain what a library is good for.", "Write about a storm at sea.",
    "Give advice to someone who cannot sleep.", "Describe how bread is made.",
    "Explain the rules of a game that you know.", "Write about the first day at a new school.",
    "Describe a train journey through the mountains.", "Explain how a bicycle works.",
    "Write a review of a film that bored you.", "Describe the work of a bee.",
    "Explain how to save water at home.", "Write about a lost key.",
    "Describe a museum of unusual things.", "Explain why people keep pets.",
    "Write a message to a neighbour about noise.", "Describe the four seasons.",
    "Explain how to learn a language.", "Write about a mayor who cannot count.",
)  # fmt: skip


_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_SENTENCE = re.compile(r"[^.!?]*\w[^.!?]*[.!?]+(?=\s|$|[\"'\u201d])")
_WORDS = "ocean bridge silver winter market garden engine letter window forest".split()
_SCRIPTS = {"CYRILLIC": "Russian", "GREEK": "Greek", "HIRAGANA": "Japanese hiragana"}


@dataclass(frozen=True)
class InstructionRule:
    """A kind of rule.

    group: rules of one group contradict each other; those of "exclusive" contradict all others.
    template: the sentence that states the rule.
    is_followed: (answer, arguments) -> True if the answer follows the rule.
    draws: argument -> its values, or a function (rng, topic) -> value. ``topic`` is the subject of
        the answer.
    """

    group: str
    template: str
    is_followed: Callable[..., bool]
    draws: Mapping[str, Sequence[Any] | Callable[[random.Random, str], Any]]

    def draw(self, rng: random.Random, topic: str) -> dict[str, Any]:
        return {
            name: values(rng, topic) if callable(values) else rng.choice(values)
            for name, values in self.draws.items()
        }

    def instruction(self, arguments: Mapping[str, Any]) -> str:
        language = _SCRIPTS.get(arguments.get("script", ""))
        return self.template.format(**arguments, language=language)


def _rule(group: str, ask: str, followed: Callable[..., bool], **draws: Any) -> InstructionRule:
    return InstructionRule(group, ask, followed, draws)


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _sentence_count(text: str) -> int:
    return len(_SENTENCE.findall(text))


def _word_count(text: str, word: str) -> int:
    return sum(token.casefold() == word.casefold() for token in _words(text))


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.M))


def _section_numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"^\W*Section (\d+)", text, re.M)]


def _is_json(text: str) -> bool:
    body = text.strip()
    if fenced := re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", body, re.S):
        body = fenced[1]
    try:
        return isinstance(json.loads(body), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_in_script(text: str, script: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return bool(letters) and all(script in unicodedata.name(c, "") for c in letters)


def _two_answers(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _has_letters(text: str) -> bool:
    return any(c.isalpha() for c in text)


RULES: dict[str, InstructionRule] = {
    "words at least": _rule(
        "length", "Write at least {n} words.", lambda t, n: len(_words(t)) >= n,
        n=range(40, 121, 20),
    ),
    "words at most": _rule(
        "length", "Write at most {n} words.", lambda t, n: 0 < len(_words(t)) <= n,
        n=range(20, 61, 10),
    ),
    "sentences": _rule(
        "length", "Write exactly {n} sentences.", lambda t, n: _sentence_count(t) == n,
        n=range(2, 6),
    ),
    "sentences at most": _rule(
        "length", "Write no more than {n} sentences.", lambda t, n: 0 < _sentence_count(t) <= n,
        n=range(2, 5),
    ),
    "paragraphs": _rule(
        "shape", "Write {n} paragraphs, with an empty line between.",
        lambda t, n: _count(r"\n\s*\n", t.strip()) == n - 1 and bool(t.strip()), n=range(2, 5),
    ),
    "bullets": _rule(
        "shape", "Give exactly {n} bullet points, each after '* '.",
        lambda t, n: _count(r"^\s*[*-]\s+\S", t) == n, n=range(3, 7),
    ),
    "numbered": _rule(
        "shape", "Give a list of exactly {n} items, numbered '1.'.",
        lambda t, n: _count(r"^\s*\d+[.)]\s+\S", t) == n, n=range(3, 7),
    ),
    "sections": _rule(
        "shape", "Write {n} sections that begin with 'Section 1', 'Section 2' and so on.",
        lambda t, n: _section_numbers(t) == [*range(1, n + 1)], n=(2, 3),
    ),
    "two answers": _rule(
        "shape", "Give two different answers, with ****** between them.", _two_answers
    ),
    "title": _rule(
        "title", "Begin with a title in double angle brackets: <<title>>.",
        lambda t: re.match(r"\s*<<[^<>\n]*\w[^<>\n]*>>", t) is not None,
    ),
    "keywords": _rule(
        "words", "Use the words '{words[0]}' and '{words[1]}'.",
        lambda t, words: all(_word_count(t, word) for word in words),
        words=lambda rng, topic: rng.sample(_WORDS, 2),
    ),
    "keyword count": _rule(
        "words", "Use the word '{word}' at least {n} times.",
        lambda t, word, n: _word_count(t, word) >= n, word=_WORDS, n=(2, 3, 4),
    ),
    "forbidden word": _rule(
        "forbidden", "Do not use the word '{word}'.",
        lambda t, word: bool(_words(t)) and not _word_count(t, word),
        word=("the", "and", "is", "very", "it"),
    ),
    "letter count": _rule(
        "letters", "Let the letter '{letter}' occur at least {n} times.",
        lambda t, letter, n: t.lower().count(letter) >= n, letter="bfgkvw", n=range(4, 10),
    ),
    "lower case": _rule(
        "exclusive", "Write in lower case only, without any capital letter.",
        lambda t: _has_letters(t) and t == t.lower(),
    ),
    "upper case": _rule(
        "exclusive", "WRITE IN CAPITAL LETTERS ONLY.", lambda t: _has_letters(t) and t == t.upper()
    ),
    "capital words": _rule(
        "capitals", "Write at least {n} words in capital letters.",
        lambda t, n: sum(w.isupper() and len(w) > 1 for w in _words(t)) >= n, n=range(2, 6),
    ),
    "script": _rule(
        "exclusive", "Write only in {language}, in its own letters and in no others.",
        _is_in_script,
        script=sorted(_SCRIPTS),
    ),
    "json": _rule("exclusive", "Write the whole answer as JSON, and nothing else.", _is_json),
    "begins with": _rule(
        "begin", "Begin with the words '{text}'.", lambda t, text: t.lstrip().startswith(text),
        text=("Dear reader", "In short", "Let us see"),
    ),
    "ends with": _rule(
        "end", "End with the exact words '{text}' and write nothing after them.",
        lambda t, text: t.rstrip().endswith(text),
        text=("That is all.", "Any questions?", "The end."),
    ),
    "postscript": _rule(
        "end", "Add a postscript at the end that begins with P.S.",
        lambda t: _count(r"^\s*P\.\s?S\.\s*\S", t) > 0,
    ),
    "no commas": _rule(
        "commas", "Do not use any comma.", lambda t: bool(_words(t)) and "," not in t
    ),
    "no digits": _rule(
        "digits", "Do not use any digit.",
        lambda t: bool(_words(t)) and not any(c.isdigit() for c in t),
    ),
    "highlights": _rule(
        "marks", "Mark at least {n} parts with asterisks: *part*.",
        lambda t, n: _count(r"(?<!\*)\*{1,2}[^*\n]+\*{1,2}(?!\*)", t) >= n, n=range(2, 5),
    ),
    "placeholders": _rule(
        "places", "Leave at least {n} placeholders in square brackets, such as [name].",
        lambda t, n: _count(r"\[[^\[\]\n]+\]", t) >= n, n=range(2, 5),
    ),
    "quoted": _rule(
        "exclusive", "Put the whole answer in double quotation marks.",
        lambda t: len(t.strip()) > 2 and t.strip()[0] == t.strip()[-1] == '"',
    ),
    "repeat": _rule(
        "exclusive", "First repeat the sentence above word for word, then answer it.",
        lambda t, text: t.lstrip().startswith(text) and bool(_words(t.lstrip()[len(text) :])),
        text=lambda rng, topic: topic,
    ),
    "choice": _rule(
        "exclusive", "Whatever you think of it, answer with one word only: yes, no or maybe.",
        lambda t: t.strip().rstrip(".!").lower() in ("yes", "no", "maybe"),
    ),
}  # fmt: skip


def make_instructions(seed: int = 0) -> list[OpenQuestion]:
    questions = []
    for kind in RULES:
        for i, extra in enumerate(EXTRA_RULES):
            rng = random.Random(f"instructions/{seed}/{kind}/{i}")
            topic = rng.choice(TOPICS)
            kinds = [kind, *_compatible_rules(kind, extra, rng)]
            rules = [[rule, RULES[rule].draw(rng, topic)] for rule in kinds]
            prompt = " ".join(
                [topic, *(RULES[rule].instruction(arguments) for rule, arguments in rules)]
            )
            id = f"{kind}/{i}"
            questions.append(
                OpenQuestion(
                    id, prompt, {"rules": rules}, max_new_tokens=TOKENS, chat=True, part=kind
                )
            )
    return questions


def _compatible_rules(kind: str, count: int, rng: random.Random) -> list[str]:
    """Return up to ``count`` kinds of rules that contradict neither this one nor each other."""
    kinds, groups = [], {RULES[kind].group, "exclusive"}
    if RULES[kind].group == "exclusive":
        return kinds
    for other in rng.sample(sorted(RULES), len(RULES)):
        if len(kinds) < count and RULES[other].group not in groups:
            kinds.append(other)
            groups.add(RULES[other].group)
    return kinds


def _followed_rules(answer: str, row: Row) -> list[bool]:
    return [RULES[kind].is_followed(answer, **arguments) for kind, arguments in row["rules"]]


@per_answer
def strict_accuracy(answer: str, row: Row) -> float:
    """Return 1 if the answer follows all of its rules."""
    return all(_followed_rules(answer, row))


@per_answer
def loose_accuracy(answer: str, row: Row) -> float:
    """Return 1 if one of the `variants` of the answer follows all of its rules."""
    return any(all(_followed_rules(variant, row)) for variant in variants(answer))


@per_answer
def rule_accuracy(answer: str, row: Row) -> float:
    """Return the share of its rules that the answer follows."""
    followed = _followed_rules(answer, row)
    return sum(followed) / len(followed)


def variants(answer: str) -> Iterator[str]:
    """Yield the answer, also without its first line, last line or both, each also without
    asterisks."""
    lines = answer.splitlines()
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(part).strip()
        yield text
        yield text.replace("*", "")


def _read(format: str, cache: Path) -> dict[str, Any]:
    del cache
    return {
        "questions": make_instructions(), "format": format, "judge": strict_accuracy,
        "metric": "strict",
        "extra_judges": {"loose": loose_accuracy, "rule_accuracy": rule_accuracy},
    }  # fmt: skip


SETS = {"instruction_rules": TaskSpec("instructions", "Apache-2.0", ("chat",), "fastlm", _read)}
