"""Plain English text that a seeded program makes, to hide facts in, and where it is cut.

Sizes are told in tokens of `BYTES_PER_TOKEN` bytes, so that the text does not depend on a model's
tokenizer and several models are asked the same.
"""

import random
from collections.abc import Iterator, Sequence

from fastlm.errors import InputError

BYTES_PER_TOKEN = 4  # SmolLM2's tokenizer has 4.3 to 4.5 on this text
LENGTHS = (512, 1024, 2048, 4096)
LONGEST = 2**20  # tokens

_WHO = (
    "the baker", "a young painter", "the old sailor", "our neighbour", "the librarian",
    "a travelling doctor", "the gardener", "a quiet student", "the town clerk", "a farmer",
    "the music teacher", "a retired engineer", "the postman", "the innkeeper", "a carpenter",
)  # fmt: skip
_DID = (
    "walked to", "spoke about", "dreamed of", "wrote a letter about", "took a picture of",
    "waited in front of", "paid a visit to", "made a sketch of", "told a story about",
    "stood and looked at", "read a book about", "asked the way to",
)  # fmt: skip
_WHAT = (
    "the harbour", "the mill by the river", "a field of barley", "the market square",
    "an empty theatre", "the railway bridge", "the orchard", "a small chapel", "the lighthouse",
    "the garden wall", "a row of poplars", "the old school", "the stone well", "a wooden boat",
)  # fmt: skip
_WHEN = (
    "in the early morning", "on a rainy day", "late in autumn", "before supper", "after the fair",
    "while the bells rang", "as the fog lifted", "during the first snow", "at the end of the week",
    "when the shops had closed", "under a clear sky", "on the way home",
)  # fmt: skip
_AND = (
    "and nobody noticed", "and then it began to rain", "because there was time",
    "and came back with bread", "although the wind was cold", "and a dog followed",
    "for the third time that year", "and went on in silence", "as so often before",
)  # fmt: skip


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield sentences without end."""
    while True:
        who, when = rng.choice(_WHO), rng.choice(_WHEN)
        did = f"{rng.choice(_DID)} {rng.choice(_WHAT)}"
        more = f", {rng.choice(_AND)}" if rng.random() < 0.5 else ""
        told = f"{when}, {who} {did}{more}" if rng.random() < 0.4 else f"{who} {did} {when}{more}"
        yield f"{told[0].upper()}{told[1:]}."


def hide(
    facts: Sequence[str], depths: Sequence[float], tokens: int, rng: random.Random, room: int = 0
) -> str:
    """Return text of ``tokens`` tokens with each fact at its depth, 0 (first) to 1 (last).

    room: bytes of it that are left for what comes with the text.
    """
    left = tokens * BYTES_PER_TOKEN - room - sum(len(fact) + 1 for fact in facts)
    found: list[str] = []
    for sentence in sentences(rng):
        if (left := left - len(sentence) - 1) < 0:
            break
        found.append(sentence)
    places = [round(depth * len(found)) for depth in depths]
    # from the last on, so that places before it stay; equal places keep the facts' order
    for place, fact in sorted(zip(places, facts), key=lambda pair: pair[0])[::-1]:
        found.insert(place, fact)
    return " ".join(found)


def lengths_of(format: str, name: str) -> list[int]:
    """The lengths that a format such as "1024,4096" names. InputError: it names none."""
    found = []
    for part in format.split(","):
        if not part.isascii() or not part.isdigit() or not 128 <= int(part) <= LONGEST:
            raise InputError(
                f"format: wanted lengths of 128 to {LONGEST} tokens such as {name}:1024,4096,"
                f" got {part!r:.40}"
            )
        found.append(int(part))
    return list(dict.fromkeys(found))
