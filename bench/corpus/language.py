"""Language identification on translated pages, and the lists of common words.

    python bench/corpus/language.py [--pages 60]

Pages: libreoffice-help in 27 languages (Debian packages, fetched into the cache), at most 60 of
each, of 400 characters or more, drawn with a seed. A page with more than 5 % of its text in lines
of the English page of the same name is left out: up to half of a package is not translated. Frames:
the same pages behind 300 characters of an English site's navigation, and with code of their own
length in their middle. Stop words: pages of 50 words or more that have two words of their
language's list; man pages for languages without libreoffice-help. CPU seconds of one core, the best
of three rounds.
"""

import argparse
import gzip
import random
import re
import time
from collections import Counter
from functools import cache
from pathlib import Path

from printing import print_rows

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "en": "en-us", "de": "de", "fr": "fr", "ja": "ja", "es": "es", "pt": "pt-br", "it": "it",
    "nl": "nl", "sv": "sv", "da": "da", "pl": "pl", "cs": "cs", "sl": "sl", "hu": "hu", "ru": "ru",
    "tr": "tr", "ko": "ko", "zh": "zh-cn", "el": "el", "fi": "fi", "et": "et", "hi": "hi",
    "ca": "ca", "gl": "gl", "eu": "eu", "vi": "vi", "km": "km",
}  # fmt: skip
MAN_PAGES = {"id": "id", "mk": "mk", "no": "nb", "ro": "ro", "sr": "sr", "uk": "uk"}
MIN_CHARACTERS = 400
UNTRANSLATED = 0.05
ROUNDS = 3
NAVIGATION = (
    "Home Products Documentation Download Community Support Log in Register Search this site Skip"
    " to main content Previous Next Table of contents About us Contact Privacy policy Terms of use"
    " Cookie settings Accept all cookies Reject all Share this page on social media Print this page"
    " Follow us "
)


def row(bar: str, value: object, target: object, unit: str, note: str = "") -> dict:
    return {"bar": bar, "value": value, "target": target, "unit": unit, "note": note}


def read_page(path: Path) -> str:
    from fastlm.data.extract import html_to_text, normalise

    return normalise(html_to_text(path.read_text("utf-8", "replace")))


@cache
def translated_pages(count: int) -> list[tuple[str, str]]:
    """Return (language, text) of at most ``count`` pages of each language."""
    from fastlm.sources.packages import default_cache, fetch

    folders = {
        code: fetch("deb", f"libreoffice-help-{name}", cache=default_cache())
        for code, name in PACKAGES.items()
    }
    english = {"/".join(p.parts[-3:]): p for p in folders["en"].rglob("*.html")}
    lines: dict[str, set[str]] = {}
    pages = []
    for code, folder in folders.items():
        paths = sorted(folder.rglob("*.html"))
        random.Random(3).shuffle(paths)
        found = 0
        for path in paths:
            if found == count:
                break
            text = read_page(path)
            name = "/".join(path.parts[-3:])
            if len(text) < MIN_CHARACTERS:
                continue
            if code != "en" and name in english:
                if name not in lines:
                    lines[name] = set(read_page(english[name]).split("\n"))
                same = sum(len(s) for s in text.split("\n") if len(s) > 20 and s in lines[name])
                if same > UNTRANSLATED * len(text):
                    continue
            pages.append((code, text))
            found += 1
    return pages


def with_code(text: str) -> str:
    code = (ROOT / "fastlm/files.py").read_text()[: len(text)]
    middle = len(text) // 2
    return f"{text[:middle]}\n{code}\n{text[middle:]}"


def accuracy_rows(pages: list[tuple[str, str]]) -> list[dict]:
    from fastlm.data.language import identify

    variants = {
        "whole pages": lambda t: t,
        "200 characters": lambda t: t[max(0, len(t) // 2 - 100) :][:200],
        "whole pages in an English frame": lambda t: NAVIGATION + t,
        "whole pages around code": with_code,
    }
    bars = {"whole pages": 0.99, "200 characters": 0.98}
    languages = len({code for code, _ in pages})
    result = []
    for method in ("langid", "cld2"):
        identify("to load the model", method=method)
        for name, variant in variants.items():
            texts = [variant(text) for _, text in pages]
            seconds = float("inf")
            for _ in range(ROUNDS):
                start = time.process_time()
                answers = [identify(text, method=method).code for text in texts]
                seconds = min(seconds, time.process_time() - start)
            wrong = Counter(
                f"{code} as {answer}" for (code, _), answer in zip(pages, answers) if answer != code
            )
            note = f"{len(pages)} pages, {languages} languages, {len(pages) / seconds:,.0f} pages/s"
            note += "".join(f"; {n} {what}" for what, n in wrong.most_common(3))
            value = round(1 - wrong.total() / len(pages), 4)
            bar = bars.get(name) if method == "langid" else None
            result.append(row(f"language, {method}, {name}", value, bar, "accuracy", note))
            if name == "whole pages":
                speed = round(len(pages) / seconds)
                result.append(row(f"language, {method}, speed", speed, None, "pages/s"))
    return result


def man_pages(name: str) -> list[str]:
    """Return the texts of the man pages of a package, without their markup."""
    from fastlm.sources.packages import default_cache, fetch

    texts = set()
    for path in sorted(fetch("deb", f"manpages-{name}", cache=default_cache()).rglob("*.gz")):
        markup = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        texts.add(re.sub(r"(?m)^[.'](?:[A-Z]{1,2} ?|.*$)|\\f.|\\[(\[]..|\\", "", markup))
    return sorted(texts)


def stop_word_rows(pages: list[tuple[str, str]]) -> list[dict]:
    """Return the share of texts that pass the rule in their language, the lowest first."""
    from fastlm.data.filter import first_failed, load_stop_words
    from fastlm.data.language import identify

    texts = {code: [t for c, t in pages if c == code] for code in PACKAGES}
    for code, name in MAN_PAGES.items():  # some pages are English
        texts[code] = [t for t in man_pages(name) if identify(t).code == code]
    shares = []
    for code in load_stop_words():
        long = [t for t in texts[code] if len(t.split()) >= 50]
        passed = sum(first_failed(t, ["stop_words"], code) is None for t in long)
        if long:
            shares.append((passed / len(long), code, len(long)))
    shares.sort()
    note = "; ".join(f"{code} {share:.3f} of {n}" for share, code, n in shares if share < 1)
    return [
        row(
            f"texts that pass stop_words, the lowest of {len(shares)} languages",
            round(shares[0][0], 3), 0.96, "share", f"{note}; all others 1",
        )
    ]  # fmt: skip


def rows(pages: int = 60) -> list[dict]:
    texts = translated_pages(pages)
    return [*accuracy_rows(texts), *stop_word_rows(texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pages", type=int, default=60, help="of a language")
    print_rows(rows(parser.parse_args().pages), ("py3langid", "pycld2", "numpy"))


if __name__ == "__main__":
    main()
