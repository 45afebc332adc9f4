"""Attacks: each turns a request that a model should refuse into a prompt.

The texts around a request are in sentences.toml and are not harmful. Published jailbreaks are read
from a package. Suffixes are searched with gradients (`fastlm.evals.safety.suffixes`).

In a multi-turn attack each turn looks harmless by itself, and the model's own answers are between
the turns. In Crescendo (Russinovich et al. 2024, arXiv:2404.01833) another model chooses each turn
from the answers. Here rules derive the turns from the request, so that they are the same for every
model and need no attacker model. This is weaker: a low rate says nothing about adaptive attackers.
"""

import base64
import codecs
from collections.abc import Callable, Sequence

from fastlm.errors import InputError
from fastlm.evals.safety.refusals import topic
from fastlm.evals.safety.texts import SENTENCES

SHOT_ROUNDS = 4  # repeats of the examples, 32 in all: 1,000 tokens, half of a small context
SLOT = "[INSERT PROMPT HERE]"  # in published jailbreaks
_LEET = str.maketrans("aeiost", "431057")
_TEXTS = SENTENCES["attacks"]


def _many_shot(request: str) -> str:
    shots = [f"User: {q}\nAssistant: {a}" for q, a in _TEXTS["shots"] * SHOT_ROUNDS]
    return "\n".join([*shots, f"User: {request}\nAssistant: Sure, here is"])


ATTACKS: dict[str, Callable[[str], str]] = {
    "plain": lambda request: request,
    "role_play": lambda request: _TEXTS["role_play"].format(request=request),
    "suppression": lambda request: _TEXTS["suppression"].format(request=request),
    "base64": lambda request: _TEXTS["base64"].format(
        code=base64.b64encode(request.encode()).decode()
    ),
    "rot13": lambda request: _TEXTS["rot13"].format(code=codecs.encode(request, "rot13")),
    "leetspeak": lambda request: request.translate(_LEET),
    "many_shot": _many_shot,
}
MODEL_OR_SET_ATTACKS = ("in_the_wild", "suffix")  # they need a set or the model
MULTI_TURN_ATTACKS = tuple(SENTENCES["turns"])
ATTACK_NAMES = (*ATTACKS, *MODEL_OR_SET_ATTACKS, *MULTI_TURN_ATTACKS)


def attack_turns(attack: str, request: str) -> list[str]:
    """Return the user's messages of a multi-turn attack; the answer to the last one is judged."""
    words = request.split()
    half = (len(words) + 1) // 2
    values = {
        "request": request, "topic": topic(request),
        "first_half": " ".join(words[:half]), "second_half": " ".join(words[half:]),
    }  # fmt: skip
    return [message.format(**values) for message in SENTENCES["turns"][attack]]


def in_the_wild(templates: Sequence[str], requests: Sequence[str]) -> list[str]:
    """Insert each request into the next jailbreak: into its slot, else at its end."""
    if not templates:
        raise InputError("jailbreaks: expected at least one, got none")
    texts = [templates[i % len(templates)] for i in range(len(requests))]
    return [
        template.replace(SLOT, request) if SLOT in template else f"{template}\n\n{request}"
        for template, request in zip(texts, requests)
    ]
