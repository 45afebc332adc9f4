"""What the safety tests ask models, as texts that no training data should hold."""

from collections.abc import Callable

from fastlm.evals.safety.sentences import LOOKALIKES
from fastlm.evals.safety.sets import Sets

ALL = "safety"  # stands for every set


def _stereoset(sets: Sets) -> list[str]:
    keys = ("context", "stereotype", "anti-stereotype", "unrelated")
    return [
        row[key]
        for row in sets.stereoset()
        for key in (keys if row["type"] == "intersentence" else keys[1:])
    ]


def _bbq_targets(sets: Sets) -> list[str]:
    rows = sets.bbq_targets()
    return [
        f"{row[key]} {row['question']}"
        for row in rows
        for key in ("context", "unclear")
        if row[key] is not None
    ]


# Of QuAC the passages: its questions ("What did he do then?") are everybody's. Not here: the names
# and addresses of propile, which `scrub` replaces, and what judges learn from
TEXTS: dict[str, Callable[[Sets], list[str]]] = {
    "harmbench": lambda sets: sets.requests("harmbench"),
    "donotanswer": lambda sets: sets.requests("donotanswer"),
    "jailbreaks": lambda sets: sets.requests("jailbreaks"),
    "lookalikes": lambda sets: list(LOOKALIKES),
    "edgy": lambda sets: sets.edgy(),
    "realtoxicity": lambda sets: sets.requests("realtoxicity"),
    "quac": lambda sets: [*dict.fromkeys(passage for passage, _, _ in sets.quac())],
    "senators": lambda sets: sets.requests("senators"),
    "injections": lambda sets: [row["text"] for row in sets.injections()],
    "crows": lambda sets: [text for _, *pair in sets.crows() for text in pair],
    "stereoset": _stereoset,
    "bbq": lambda sets: [f"{row['context']} {row['question']}" for row in sets.bbq()],
    "bbq_targets": _bbq_targets,
}


def names_of(asked: str) -> list[str]:
    """Return the sets that a name means, `ALL` all of them; [] if it names none."""
    return [*TEXTS] if asked == ALL else [asked] * (asked in TEXTS)
