"""Long context, made by a seeded program: facts to find (`needle`) and chains to follow (`hops`).

Both follow RULER (Hsieh et al. 2024, arXiv:2404.06654), in words of their own. A format names
lengths in tokens (`fastlm.evals.sets.filler`): ``needle:1024,8192``. A text that is longer than a
model's context is cut at its beginning, and the result says how often.
"""

import random
import re
from itertools import pairwise
from pathlib import Path

from fastlm.evals.answers import Asked
from fastlm.evals.sets.filler import LENGTHS, hide, lengths_of
from fastlm.evals.task import Open, Task
from fastlm.evals.task_spec import TaskSpec

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


def needle(format: str, seed: int = 0) -> list[Open]:
    """Questions for one fact among three others of its kind, at five depths of each length."""
    questions = []
    for length in lengths_of(format, "needle"):
        for depth in DEPTHS:
            for i in range(REPEATS):
                id = f"{length}/{depth:g}/{i}"
                rng = random.Random(f"needle/{seed}/{id}")
                places = rng.sample(_PLACES, 4)
                numbers = rng.sample(range(1_000_000, 10_000_000), 4)
                facts = [f"The number of the vault in {p} is {n}." for p, n in zip(places, numbers)]
                begin = "A number is hidden in the following text. Remember it.\n\n"
                asked = f"The number of the vault in {places[0]} is"
                end = f"\n\nQuestion: What is the number of the vault in {places[0]}?\nAnswer: "
                depths = [depth, *(rng.random() for _ in facts[1:])]
                room = len(begin) + len(end) + len(asked)
                text = hide(facts, depths, length, rng, room)
                questions.append(
                    Open(
                        id, f"{begin}{text}{end}{asked}", {"wanted": [str(numbers[0])]},
                        f" {numbers[0]}", stop=("\n",), max_new_tokens=16,
                        part=f"{length} tokens, depth {100 * depth:.0f} %",
                    )
                )  # fmt: skip
    return questions


_EXAMPLE = (
    "Text: ABC is 11111. The bell rang. DEF is 22222. QRS is the same as ABC. It was late. "
    "TUV is the same as QRS.\n"
    "Question: Which 3 names stand for 11111?\nAnswer: ABC, QRS, TUV\n\n"
)


def hops(format: str, seed: int = 0) -> list[Open]:
    """Questions for all names of a number: each name is the same as the one before it. A second
    chain of the same length is not asked for."""
    questions = []
    for length in lengths_of(format, "hops"):
        for count in HOPS:
            for i in range(CHAINS):
                id = f"{length}/{count}/{i}"
                rng = random.Random(f"hops/{seed}/{id}")
                names = _names(rng, 2 * (count + 1))
                values = rng.sample(range(10_000, 100_000), 2)
                facts: list[str] = []
                depths: list[float] = []
                chains = names[: count + 1], names[count + 1 :]
                for chain, value in zip(chains, values):
                    facts.append(f"{chain[0]} is {value}.")
                    facts += [f"{b} is the same as {a}." for a, b in pairwise(chain)]
                    depths += sorted(rng.random() for _ in chain)
                end = f"\nQuestion: Which {count + 1} names stand for {values[0]}?\nAnswer:"
                text = hide(facts, depths, length, rng, len(_EXAMPLE) + len(end) + 6)
                questions.append(
                    Open(
                        id, f"{_EXAMPLE}Text: {text}{end}", {"wanted": chains[0]},
                        f" {', '.join(chains[0])}", stop=("\n",), max_new_tokens=8 * (count + 1),
                        part=f"{length} tokens, {count} hops",
                    )
                )  # fmt: skip
    return questions


def _names(rng: random.Random, count: int) -> list[str]:
    letters = "BCDFGHJKLMNPQRSTVWXZ"  # no vowels: no words
    known = {"ABC", "DEF", "QRS", "TUV"}
    found: list[str] = []
    while len(found) < count:
        name = "".join(rng.choices(letters, k=3))
        if name not in known:
            known.add(name)
            found.append(name)
    return found


def finds_number(asked: Asked) -> list[float]:
    """1 if the answer's first number is the wanted one."""
    return [
        float(re.findall(r"\d+", answer.replace(",", ""))[:1] == list(row["wanted"]))
        for answer, row in asked
    ]


def finds_names(asked: Asked) -> list[float]:
    """The share of the wanted names among as many that the answer names first."""
    scores = []
    for answer, row in asked:
        wanted = set(row["wanted"])
        named = list(dict.fromkeys(_NAME.findall(answer)))[: len(wanted)]
        scores.append(len(wanted & set(named)) / len(wanted))
    return scores


def _read(spec: TaskSpec, name: str, format: str, cache: Path) -> Task:
    del cache
    make, judge = {"needle": (needle, finds_number), "hops": (hops, finds_names)}[name]
    questions = make(format)
    wider = {q.part: q.part.partition(",")[0] for q in questions}
    return spec.task(name, format, questions, judge=judge, metric="found", wider=wider)


_DEFAULT = ",".join(map(str, LENGTHS))
SETS = {
    name: TaskSpec("long context", "Apache-2.0", (_DEFAULT,), _read, "fastlm", free=True)
    for name in ("needle", "hops")
}
