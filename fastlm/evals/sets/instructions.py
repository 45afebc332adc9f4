"""Instructions with rules that a program checks (`fastlm.evals.sets.rules`).

Every kind of rule has five prompts: three with it alone, one with a second rule, one with a third.
``followed`` is 1 where an answer follows all its rules. ``loose`` also accepts an answer that does
so without its first line, its last line, or its asterisks (IFEval's loose accuracy). ``rules`` is
the share of the rules that it follows.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.evals.answers import Asked
from fastlm.evals.sets.rules import RULES
from fastlm.evals.task import Open, Task
from fastlm.evals.task_spec import TaskSpec

OTHERS = (0, 0, 0, 1, 2)  # further rules of a kind's prompts
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


def instructions(seed: int = 0) -> list[Open]:
    questions = []
    for kind in RULES:
        alone = RULES[kind].group == "alone"
        for i, more in enumerate(OTHERS):
            rng = random.Random(f"instructions/{seed}/{kind}/{i}")
            topic = rng.choice(TOPICS)
            kinds = [kind, *([] if alone else _fitting(kind, more, rng))]
            rules = [(one, RULES[one].draw(rng, topic)) for one in kinds]
            asked = " ".join([topic, *(RULES[one].ask(found) for one, found in rules)])
            row = {"rules": [[one, dict(found)] for one, found in rules]}
            questions.append(
                Open(f"{kind}/{i}", asked, row, max_new_tokens=TOKENS, chat=True, part=kind)
            )
    return questions


def _fitting(kind: str, count: int, rng: random.Random) -> list[str]:
    """``count`` kinds of rules that do not contradict this one or each other."""
    found, groups = [], {RULES[kind].group, "alone"}
    for other in rng.sample(sorted(RULES), len(RULES)):
        if len(found) < count and RULES[other].group not in groups:
            found.append(other)
            groups.add(RULES[other].group)
    return found


def _followed(answer: str, rules: Sequence[Any]) -> list[bool]:
    return [RULES[kind].followed(answer, arguments) for kind, arguments in rules]


def strict(asked: Asked) -> list[float]:
    """1 if the answer follows all its rules."""
    return [float(all(_followed(answer, row["rules"]))) for answer, row in asked]


def loose(asked: Asked) -> list[float]:
    """1 if one of the `variants` of the answer follows all its rules."""
    return [
        float(any(all(_followed(one, row["rules"])) for one in variants(answer)))
        for answer, row in asked
    ]


def share(asked: Asked) -> list[float]:
    """The share of its rules that the answer follows."""
    found = [_followed(answer, row["rules"]) for answer, row in asked]
    return [sum(each) / len(each) for each in found]


def variants(answer: str) -> Iterator[str]:
    """The answer, without its first line, its last line and both; all also without asterisks."""
    lines = answer.splitlines()
    for kept in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(kept).strip()
        yield text
        yield text.replace("*", "")


def _read(spec: TaskSpec, name: str, format: str, cache: Path) -> Task:
    del cache
    also: Mapping[str, Any] = {"loose": loose, "rules": share}
    return spec.task(name, format, instructions(), judge=strict, metric="followed", also=also)


SETS = {"instruction_rules": TaskSpec("instructions", "Apache-2.0", ("chat",), _read, "fastlm")}
