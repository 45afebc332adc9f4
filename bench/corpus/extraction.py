"""Measure `fastlm.data.extract` on labelled articles and on documentation.

    python bench/corpus/extraction.py

Articles: the 91 pages of ``article-extraction`` (``$FASTLM_DATA`` or ``../shared/data``; the rows
are left out without it) with precision, recall and F1 of 4-grams of words, means over pages. The
second set, on which nothing was tuned, is the news pages of newspaper4k's source archive. The rules
were tuned on half A of the 91 (even first byte of the SHA-256 of the id); the note has both halves.
Peers (trafilatura, justext, readability-lxml) run where they are installed. CPU seconds, one core.
"""

import hashlib
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
import labelled_articles
from printing import print_rows

from fastlm.data.extract import main_text, precise_text
from fastlm.sources.packages import default_cache, fetch
from fastlm.sources.source_files import decode_web, list_files, read_files

SECOND = "newspaper4k==0.9.6"
DOCUMENTATION = ("php-doc", "libreoffice-help-en-us", "python3.13-doc")
PAGES = 300
Pages = dict[str, tuple[bytes, str]]


def second_set() -> Pages:
    data = fetch("sdist", SECOND, cache=default_cache())
    texts = {p.stem: p.read_text() for p in data.rglob("tests/data/txt/*.txt")}
    pages = {p.stem: p.read_bytes() for p in data.rglob("tests/data/html/*.html")}
    return {name: (pages[name], texts[name]) for name in sorted(texts.keys() & pages.keys())}


def extractors() -> dict[str, Callable[[bytes], str]]:
    """Return the extractors that are installed, by name."""
    table: dict[str, Callable[[bytes], str]] = {
        "fastlm fast": main_text,
    }
    peers: dict[str, Any] = {}
    for name in ("trafilatura", "justext", "readability"):
        try:
            peers[name] = import_module(name)
        except ImportError:
            continue
    if trafilatura := peers.get("trafilatura"):
        table["fastlm precise"] = lambda page: precise_text(page).text
        for name, options in (
            ("fast", {"fast": True}), ("default", {}), ("precise", {"favor_precision": True}),
        ):  # fmt: skip
            table[f"trafilatura {name}"] = lambda page, options=options: (
                trafilatura.extract(page, **options) or ""
            )
    if justext := peers.get("justext"):
        words = justext.get_stoplist("English")
        table["justext"] = lambda page: "\n".join(
            p.text for p in justext.justext(page, words) if not p.is_boilerplate
        )
    if readability := peers.get("readability"):
        table["readability-lxml"] = lambda page: "".join(
            import_module("lxml.html")
            .fromstring(readability.Document(decode_web(page, html=True)).summary())
            .itertext()
        )
    return table


def half(name: str) -> str:
    return "B" if hashlib.sha256(name.encode()).digest()[0] % 2 else "A"


def article_rows(title: str, pages: Pages, halves: bool) -> list[dict[str, Any]]:
    result = []
    for name, extractor in extractors().items():
        extractor(next(iter(pages.values()))[0])
        began = time.process_time()
        texts = {key: extractor(page) for key, (page, _) in pages.items()}
        speed = len(pages) / (time.process_time() - began)
        precision, recall, f1 = labelled_articles.score(
            (text, pages[key][1]) for key, text in texts.items()
        )
        note = f"P {precision:.3f}, R {recall:.3f}, {speed:.0f} pages/s"
        for part in "AB" if halves else "":
            scores = labelled_articles.score(
                (text, pages[key][1]) for key, text in texts.items() if half(key) == part
            )
            note += f", half {part} F1 {scores[2]:.4f}"
        is_bar = halves and name == "fastlm fast"
        result.append({
            "bar": f"{title}: {name}", "value": round(f1, 4), "target": 0.945 if is_bar else None,
            "unit": "F1", "note": note,
        })  # fmt: skip
        if is_bar:
            result.append({
                "bar": f"{title}: {name}, speed", "value": round(speed), "target": 60,
                "unit": "pages/s", "note": "one core",
            })  # fmt: skip
    return result


def documentation_rows() -> list[dict[str, Any]]:
    result = []
    for package in DOCUMENTATION:
        files, _ = list_files(f"deb:{package}", cache=default_cache())
        html = [file for file in files if file.format == "html"]
        step = max(1, len(html) // PAGES)
        pages = [document.text for document in read_files(html[::step][:PAGES])]
        main_text(pages[0])
        began = time.process_time()
        for page in pages:
            main_text(page)
        speed = len(pages) / (time.process_time() - began)
        size = sum(map(len, pages)) // len(pages)
        result.append({
            "bar": f"{package}: fastlm fast", "value": round(speed), "target": None,
            "unit": "pages/s", "note": f"{len(pages)} pages of {size:,} characters",
        })  # fmt: skip
    return result


def rows() -> list[dict[str, Any]]:
    result = []
    if path := labelled_articles.folder():
        result += article_rows("91 articles", labelled_articles.articles(path), halves=True)
    result += article_rows(SECOND, second_set(), halves=False)
    return result + documentation_rows()


def main() -> None:
    print_rows(rows(), ("resiliparse", "trafilatura", "justext", "readability-lxml"))


if __name__ == "__main__":
    main()
