"""Long-context questions from a seeded program: facts to find (``needle``) and chains of names to
follow (``hops``).

Both follow RULER (Hsieh et al. 2024, arXiv:2404.06654) with other wording. A format such as
``needle:1024,8192`` has lengths in tokens of `BYTES_PER_TOKEN` bytes, so that the text does not
depend on a tokenizer and all models get the same questions. A text longer than a model's context is
truncated at its start; the result counts how often.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.answers import Row, per_answer
from fastlm.evals.task import Judge, OpenQuestion, TaskSpec

BYTES_PER_TOKEN = 4  # SmolLM2's tokenizer has 4.3 to 4.5 on this text
MAX_LENGTH = 2**20  # tokens
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
REPEATS = 4  # questions per length and depth
HOPS = (1, 2, 4)
CHAINS = 5  # questions per length and number of hops
_NAME = re.compile(r"\b[A-Z]{3}\b")
_PLACES = (
    "Aldermoor", "Brackwater", "Cinderfold", "Dunmarrow", "Eastlever", "Fennick", "Garrowby",
    "Hollinside", "Inverlough", "Jarnholm", "Kestlemere", "Lowgate", "Marrick", "Northwold",
    "Ottermouth", "Penhallow", "Quarrendon", "Ravensby", "Selworthy", "Thornaby", "Ulverton",
    "Wexcombe", "Yarrowdale",
)  # fmt: skip
_SUBJECTS = (
    "the baker", "a young painter", "the old sailor", "our neighbour", "the librarian",
    "a travelling doctor", "the gardener", "a quiet student", "the town clerk", "a farmer",
    "the music teacher", "a retired engineer", "the postman", "the innkeeper", "a carpenter",
)  # fmt: skip
_VERBS = (
    "walked to", "spoke about", "dreamed of", "wrote a letter about", "took a picture of",
    "waited in front of", "paid a visit to", "made a sketch of", "told a story about",
    "stood and looked at", "read a book about", "asked the way to",
)  # fmt: skip
_OBJECTS = (
    "the harbour", "the mill by the river", "a field of barley", "the market square",
    "an empty theatre", "the railway bridge", "the orchard", "a small chapel", "the lighthouse",
    "the garden wall", "a row of poplars", "the old school", "the stone well", "a wooden boat",
)  # fmt: skip
_TIMES = (
    "in the early morning", "on a rainy day", "late in autumn", "before supper", "after the fair",
    "while the bells rang", "as the fog lifted", "during the first snow", "at the end of the week",
    "when the shops had closed", "under a clear sky", "on the way home",
)  # fmt: skip
_CLAUSES = (
    "and nobody noticed", "and then it began to rain", "because there was time",
    "and came back with bread", "although the wind was cold", "and a dog followed",
    "for the third time that year", "and went on in silence", "as so often before",
)  # fmt: skip


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield random sentences, endlessly."""
    while True:
        who, when = rng.choice(_SUBJECTS), rng.choice(_TIMES)
        did = f"{rng.choice(_VERBS)} {rng.choice(_OBJECTS)}"
        clause = f", {rng.choice(_CLAUSES)}" if rng.random() < 0.5 else ""
        sentence = (
            f"{when}, {who} {did}{clause}" if rng.random() < 0.4 else f"{who} {did} {when}{clause}"
        )
        yield f"{sentence[0].upper()}{sentence[1:]}."


def hide_facts(
    facts: Sequence[str],
    depths: Sequence[float],
    tokens: int,
    rng: random.Random,
    reserved_bytes: int = 0,
) -> str:
    """Return text of ``tokens`` tokens with each fact at its depth, 0 (start) to 1 (end).

    reserved_bytes: bytes of the length that are kept free for the rest of the prompt.
    """
    budget = tokens * BYTES_PER_TOKEN - reserved_bytes - sum(len(fact) + 1 for fact in facts)
    text: list[str] = []
    for sentence in sentences(rng):
        if (budget := budget - len(sentence) - 1) < 0:
            break
        text.append(sentence)
    indices = [round(depth * len(text)) for depth in depths]
    # from the last on, so that earlier indices stay valid; equal depths keep the facts' order
    for index, fact in sorted(zip(indices, facts), key=lambda pair: pair[0])[::-1]:
        text.insert(index, fact)
    return " ".join(text)


def _lengths(format: str, name: str) -> list[int]:
    """Return the lengths in a format such as "1024,4096". InputError: it is not such a list."""
    parts = list(dict.fromkeys(format.split(",")))
    for part in parts:
        if not part.isascii() or not part.isdigit() or not 128 <= int(part) <= MAX_LENGTH:
            raise InputError(
                f"format: expected lengths of 128 to {MAX_LENGTH} tokens such as {name}:1024,4096,"
                f" got {part!r:.40}"
            )
    return [int(part) for part in parts]


def make_needle_questions(lengths: Sequence[int], seed: int = 0) -> list[OpenQuestion]:
    """Return questions about one of four similar facts, at five depths of each length."""
    questions = []
    begin = "A number is hidden in the following text. Remember it.\n\n"
    for length, depth, i in product(lengths, DEPTHS, range(REPEATS)):
        id = f"{length}/{depth:g}/{i}"
        rng = random.Random(f"needle/{seed}/{id}")
        places = rng.sample(_PLACES, 4)
        numbers = rng.sample(range(1_000_000, 10_000_000), 4)
        facts = [f"The number of the vault in {p} is {n}." for p, n in zip(places, numbers)]
        cue = f"The number of the vault in {places[0]} is"
        end = f"\n\nQuestion: What is the number of the vault in {places[0]}?\nAnswer: {cue}"
        depths = [depth, *(rng.random() for _ in facts[1:])]
        text = hide_facts(facts, depths, length, rng, len(begin) + len(end))
        questions.append(
            OpenQuestion(
                id, f"{begin}{text}{end}", {"expected": [str(numbers[0])]}, f" {numbers[0]}",
                stop=("\n",), max_new_tokens=16,
                part=f"{length} tokens, depth {100 * depth:.0f} %",
            )
        )  # fmt: skip
    return questions


_EXAMPLE = (
    "Text: ABC is 11111. The bell rang. DEF is 22222. QRS is the same as ABC. It was late. "
    "TUV is the same as QRS.\n"
    "Question: Which 3 names stand for 11111?\nAnswer: ABC, QRS, TUV\n\n"
)


def make_hops_questions(lengths: Sequence[int], seed: int = 0) -> list[OpenQuestion]:
    """Return questions about all names of a number in a chain of names, each equal to the one
    before. A second chain of the same length is a distractor."""
    questions = []
    for length, count, i in product(lengths, HOPS, range(CHAINS)):
        id = f"{length}/{count}/{i}"
        rng = random.Random(f"hops/{seed}/{id}")
        names = _draw_names(rng, 2 * (count + 1))
        values = rng.sample(range(10_000, 100_000), 2)
        facts: list[str] = []
        depths: list[float] = []
        chains = names[: count + 1], names[count + 1 :]
        for chain, value in zip(chains, values):
            facts.append(f"{chain[0]} is {value}.")
            facts += [f"{b} is the same as {a}." for a, b in pairwise(chain)]
            depths += sorted(rng.random() for _ in chain)
        end = f"\nQuestion: Which {count + 1} names stand for {values[0]}?\nAnswer:"
        text = hide_facts(facts, depths, length, rng, len(_EXAMPLE) + len(end) + 6)
        questions.append(
            OpenQuestion(
                id, f"{_EXAMPLE}Text: {text}{end}", {"expected": chains[0]},
                f" {', '.join(chains[0])}", stop=("\n",), max_new_tokens=8 * (count + 1),
                part=f"{length} tokens, {count} hops",
            )
        )  # fmt: skip
    return questions


def _draw_names(rng: random.Random, count: int) -> list[str]:
    letters = "BCDFGHJKLMNPQRSTVWXZ"  # no vowels: no words
    names: dict[str, None] = dict.fromkeys(("ABC", "DEF", "QRS", "TUV"))  # names of the example
    while len(names) < count + 4:
        names["".join(rng.choices(letters, k=3))] = None
    return [*names][4:]


@per_answer
def first_number_matches(answer: str, row: Row) -> float:
    """Return 1 if the answer's first number is the expected one."""
    return re.findall(r"\d+", answer.replace(",", ""))[:1] == list(row["expected"])


@per_answer
def named_share(answer: str, row: Row) -> float:
    """Return the share of the expected names among the first names of the answer, as many."""
    expected = set(row["expected"])
    names = list(dict.fromkeys(_NAME.findall(answer)))[: len(expected)]
    return len(expected & set(names)) / len(expected)


def _set(name: str, make: Callable[[Sequence[int]], list[OpenQuestion]], judge: Judge) -> TaskSpec:
    def read(format: str, cache: Path) -> dict[str, Any]:
        del cache
        questions = make(_lengths(format, name))
        group_of_part = {q.part: q.part.partition(",")[0] for q in questions}
        return {
            "questions": questions, "format": format, "judge": judge, "metric": "recall",
            "group_of_part": group_of_part,
        }  # fmt: skip

    formats = ("512,1024,2048,4096",)
    return TaskSpec("long context", "Apache-2.0", formats, "fastlm", read, any_format=True)


SETS = {
    "needle": _set("needle", make_needle_questions, first_number_matches),
    "hops": _set("hops", make_hops_questions, named_share),
}
