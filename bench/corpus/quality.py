"""Quality and toxicity of documents: speed, what the models have learned, false alarms.

    python bench/corpus/quality.py [--documents 1500]

Quality: python3.13-doc and Django's documentation as good, php-doc and libreoffice-help as other
sources. These sources are easy to tell apart, so the AUC on held-out documents is near 1; the AUC
of a model that was trained without the source is the honest one. Toxicity: the judge of fastlm
safety, alone and with benign pieces of php-doc and debian-faq; 150 pages each of python3.13-doc,
libreoffice-help and an encyclopedia (passages of QuAC), their first 600 words; toxic sentences that
the judge was not fitted to, put at random places until they are a tenth or a half of the words.
Packages are fetched into the cache. CPU seconds of one core, the best of three rounds.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from printing import print_rows

GOOD = ("deb:python3.13-doc", "sdist:django==5.2.19")
OTHER = ("deb:php-doc", "deb:libreoffice-help-en-us")
BENIGN = ("deb:php-doc", "deb:debian-faq")
PAGES, WORDS = 150, 600
THRESHOLD = 0.8
ROUNDS = 3


def row(bar: str, value: object, target: object, unit: str, note: str = "") -> dict:
    return {"bar": bar, "value": value, "target": target, "unit": unit, "note": note}


@cache
def texts(source: str, count: int) -> list[str]:
    """Return the text of pages of 800 characters or more."""
    from fastlm.data.texts import read_texts

    return list(islice((t for t in read_texts(source) if len(t) >= 800), count))


def speed(score: Callable[[Sequence[str]], Any], pages: Sequence[str]) -> int:
    seconds = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        score(pages)
        seconds = min(seconds, time.process_time() - start)
    return round(len(pages) / seconds)


def all_pages() -> tuple[list[str], str]:
    pages = [t for source in (GOOD[0], *OTHER) for t in texts(source, 500)]
    mean = sum(map(len, pages)) / len(pages)
    return pages, f"{len(pages)} pages of {mean:,.0f} characters on average"


def quality_rows(documents: int) -> list[dict]:
    from fastlm.data.quality import QualityModel, train_quality

    start = time.process_time()
    model = train_quality(GOOD, OTHER, max_documents=documents)
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        size = (Path(folder) / "model").stat().st_size
        model = QualityModel.load(Path(folder) / "model")
    pages, note = all_pages()
    used = sum(s["documents"] for s in model.sources)
    result = [
        row("quality, speed", speed(model.score, pages), 3000, "pages/s", note),
        row("quality, training", round(seconds, 1), None, "CPU s", f"{used:,} documents"),
        row("quality, file", size, None, "bytes"),
    ]
    for s in model.sources:
        note = f"trained without it: {s['left_out_auc']:.3f}; {s['heldout']} held-out documents"
        result.append(row(f"quality, AUC of {s['source']}", round(s["auc"], 4), None, "AUC", note))
    return result


def toxic_documents(page: str, toxic: Sequence[str], share: float, draw: random.Random) -> str:
    """Return the page with toxic sentences at random places, about ``share`` of the words."""
    words = page.split()[:WORDS]
    goal = share / (1 - share) * len(words)
    added = 0
    while added < goal:
        sentence = draw.choice(toxic).split()
        position = draw.randrange(len(words) + 1)
        words[position:position] = sentence
        added += len(sentence)
    return " ".join(words)


def toxicity_rows() -> list[dict]:
    from fastlm.data.toxicity import ToxicityModel
    from fastlm.evals.safety.model_under_test import TOXIC, SafetyJudges
    from fastlm.evals.safety.sets import SafetySets, sample
    from fastlm.sources.packages import default_cache

    sets = SafetySets(default_cache())
    toxic, _ = sets.toxic_texts()
    unused = sorted({*toxic} - {*sample(toxic, TOXIC, 0)})
    sources = {source: texts(source, PAGES) for source in (GOOD[0], OTHER[1])}
    passages = [*dict.fromkeys(passage for passage, _, _ in sets.quac())]
    sources["encyclopedia"] = passages[-PAGES:]
    pages, note = all_pages()
    result = []
    for name, benign in (("judge", ()), ("judge with benign pieces", BENIGN)):
        model: ToxicityModel = SafetyJudges(sets).toxicity_model(benign)
        if not benign:
            result.append(row("toxicity, speed", speed(model.score, pages), None, "pages/s", note))
        finds, passes = model.accuracy["sensitivity"], model.accuracy["specificity"]
        agreement = round((finds[0] + passes[0]) / (finds[1] + passes[1]), 3)
        counts = f"finds {finds[0]} of {finds[1]}, passes {passes[0]} of {passes[1]}; five-fold"
        result.append(row(f"toxicity, {name}: short texts", agreement, None, "agreement", counts))
        for source, documents in sources.items():
            draw = random.Random(0)
            shares = {
                share: (
                    model.score(toxic_documents(d, unused, share, draw) for d in documents)
                    > THRESHOLD
                ).mean()
                for share in (0.0, 0.1, 0.5)
            }
            found = (
                f"finds {shares[0.1]:.2f} of pages that are a tenth toxic, {shares[0.5]:.2f} half"
            )
            result.append(
                row(
                    f"toxicity, {name}: {source}, false alarms at {THRESHOLD}",
                    round(float(shares[0.0]), 3), None, "share", f"{len(documents)} pages; {found}",
                )
            )  # fmt: skip
    return result


def rows(documents: int = 1500) -> list[dict]:
    return [*quality_rows(documents), *toxicity_rows()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=1500, help="of a source")
    print_rows(rows(parser.parse_args().documents), ("scikit-learn", "numpy", "scipy"))


if __name__ == "__main__":
    main()
