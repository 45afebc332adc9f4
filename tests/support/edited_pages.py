"""Pages of the documentation with edited copies, for tests of near duplicates."""

import random
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def edits(words: list[str], share: float, rng: random.Random) -> list[str]:
    """Return the words with some replaced, some deleted and some inserted."""
    result = []
    for word in words:
        action = rng.random() / share if share else 9
        result += [word] if action > 1 else rng.choice([[], ["edit"], [word, "insertion"]])
    return result


def edited_pages(count: int) -> list[str]:
    """Return sections of the documentation, each with up to six edited copies, shuffled."""
    rng, pages = random.Random(7), []
    for path in sorted(DOCS.glob("*.md")):
        for section in path.read_text("utf-8").split("\n## "):
            words = section.split()[:250]
            pages.append(" ".join(words))
            for _ in range(rng.randrange(7) if len(words) > 40 else 0):
                pages.append(" ".join(edits(words, rng.choice([0, 0.01, 0.03, 0.1]), rng)))
    rng.shuffle(pages)
    return pages[:count]
