"""Measure `fastlm.data.personal`: recall on labelled sentences, false alarms, speed.

    python bench/corpus/personal_data.py [--presidio PYTHON]

Sentences: the templates and the fake identities of `presidio-evaluator` (fetched as a package), 40
sentences of each template that has a kind of fastlm's, with a fixed seed. As in its generator, the
first e-mail address and telephone number of a sentence are those of an identity, others and cards,
IBANs, IPs and social security numbers are drawn (`faker`, the generator's list of formats). Private
IPs are no personal data and have no label. A label counts as found if spans of its kind cover all
of its letters and digits.

``PYTHON``: the interpreter of an environment with `presidio-analyzer`, whose pattern recognisers
read the same sentences, all scores counted.

Documentation: all pages of php-doc, libreoffice-help-en-us and python3.13-doc.
"""

import argparse
import ast
import csv
import ipaddress
import json
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

from printing import print_rows

from fastlm.data.extract import extract
from fastlm.data.personal import DEFAULT_KINDS, KINDS, find, replace
from fastlm.data.personal.numbers import WORDS
from fastlm.data.personal.phones import WEB_REGIONS
from fastlm.sources.packages import default_cache, fetch
from fastlm.sources.source_files import Document

SEED, SENTENCES = 20261130, 40
DOCUMENTATION = ("php-doc", "libreoffice-help-en-us", "python3.13-doc")
SLOTS = {
    "email": "email", "phone_number": "phone", "ip_address": "ip", "credit_card_number": "card",
    "iban": "iban", "ssn": "national",
}  # fmt: skip
NEVER = ("2147483647", "13107328", "2.147.483.648", "1445990400000")
Label = tuple[int, int, str]  # start, end, kind
Sentence = tuple[str, list[Label]]
PRESIDIO = """
import json, sys
from presidio_analyzer.predefined_recognizers import (CreditCardRecognizer, EmailRecognizer,
    IbanRecognizer, IpRecognizer, PhoneRecognizer, UsSsnRecognizer)
kinds = {"card": CreditCardRecognizer(), "email": EmailRecognizer(), "iban": IbanRecognizer(),
    "ip": IpRecognizer(), "phone": PhoneRecognizer(), "national": UsSsnRecognizer()}
for line in sys.stdin:
    text = json.loads(line)
    found = [(r.start, r.end, kind) for kind, recognizer in kinds.items()
             for r in recognizer.analyze(text, recognizer.supported_entities, None) or ()]
    print(json.dumps(found))
"""


def sentences() -> Iterator[Sentence]:
    """Yield labelled sentences, the same ones in every run."""
    from faker import Faker

    folder = fetch("pypi", "presidio-evaluator", cache=default_cache())
    raw = folder / "presidio_evaluator" / "data_generator" / "raw_data"
    lines = (raw / "templates.txt").read_text("utf-8", "replace").splitlines()
    templates = [line.replace("\\n", "\n").replace("\\,", ",") for line in lines]
    with (raw / "FakeNameGenerator.com_3000.csv").open(encoding="utf-8-sig") as file:
        people = list(csv.DictReader(file))
    formats = _phone_formats(folder)
    draw = random.Random(SEED)
    fake = Faker("en_US")
    fake.seed_instance(SEED)
    values: dict[str, Callable[[], str]] = {
        "email": fake.email,
        "phone_number": lambda: fake.numerify(draw.choice(formats)),
        "ip_address": lambda: fake.ipv4() if draw.random() < 0.8 else fake.ipv6(),
        "credit_card_number": fake.credit_card_number,
        "iban": fake.iban,
        "ssn": fake.ssn,
    }
    for template in templates:
        if not SLOTS.keys() & set(re.findall(r"{{(\w+)}}", template)):
            continue
        for _ in range(SENTENCES):
            person = draw.choice(people)
            first = {"email": person["EmailAddress"], "phone_number": person["TelephoneNumber"]}
            yield _fill(template, values, first, fake)


def _fill(template: str, values, first: dict[str, str], fake) -> Sentence:
    parts: list[str] = []
    labels: list[Label] = []
    size = 0
    for i, part in enumerate(re.split(r"{{(\w+)}}", template)):
        if i % 2:
            kind = SLOTS.get(part)
            value = first.pop(part, None) or (values[part]() if kind else _other(part, fake))
            if kind and (kind != "ip" or ipaddress.ip_address(value).is_global):
                labels.append((size, size + len(value), kind))
            part = value
        parts.append(part)
        size += len(part)
    return "".join(parts), labels


def _other(slot: str, fake) -> str:
    """Return text for a slot of another kind, as it stands in sentences."""
    names = {"organization": "company", "person": "name", "nationality": "country", "age": "year"}
    return str(getattr(fake, names.get(slot, slot), fake.word)())


def _phone_formats(folder: Path) -> list[str]:
    """Read the formats of telephone numbers from the generator's source."""
    path = folder / "presidio_evaluator/data_generator/faker_extensions/providers.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == "PhoneNumberProviderNew":
            for item in node.body:
                if isinstance(item, ast.Assign):
                    return list(ast.literal_eval(item.value))
    raise RuntimeError(f"{path}: expected PhoneNumberProviderNew.formats")


def recall(texts: Sequence[Sentence], spans: Sequence[Sequence[Label]]) -> dict[str, float]:
    """Return the share of labels that spans of their kind cover, by kind."""
    total: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for (text, labels), found in zip(texts, spans, strict=True):
        for start, end, kind in labels:
            covered = {i for a, b, k in found if k == kind for i in range(a, b)}
            total[kind] += 1
            hits[kind] += all(i in covered for i in range(start, end) if text[i].isalnum())
    return {kind: hits[kind] / total[kind] for kind in sorted(total)}


def presidio_spans(python: str, texts: Sequence[Sentence]) -> list[list[Label]]:
    lines = "".join(json.dumps(text) + "\n" for text, _ in texts)
    done = subprocess.run(
        [python, "-c", PRESIDIO], input=lines, capture_output=True, text=True, timeout=900,
        check=True,
    )  # fmt: skip
    return [[(a, b, k) for a, b, k in json.loads(line)] for line in done.stdout.splitlines()]


def stdnum_vectors() -> Iterator[tuple[str, str, str]]:
    """Yield (module, its word, valid number) of the tests of python-stdnum."""
    root = next(fetch("sdist", "python-stdnum", cache=default_cache()).glob("python_stdnum-*"))
    for names, modules in WORDS:
        for module in modules:
            test = root / f"tests/test_{module.replace('.', '_').replace('__', '_')}.doctest"
            text = (root / f"stdnum/{module.replace('.', '/')}.py").read_text()
            text += test.read_text() if test.is_file() else ""
            lines = (line[4:].strip() for line in text.splitlines() if line.startswith("... "))
            numbers = {*re.findall(r"validate\('([^']+)'\)", text), *lines}
            validator = import_module(f"stdnum.{module}")
            for number in sorted(filter(validator.is_valid, numbers)):
                yield module, names.partition("|")[0], number


@cache
def documentation() -> tuple[list[str], int]:
    """Return (the texts of all pages, bytes of their HTML)."""
    texts, size = [], 0
    for name in DOCUMENTATION:
        for path in sorted(fetch("deb", name, cache=default_cache()).rglob("*.html")):
            if path.is_file():
                html = path.read_text("utf-8", "replace")
                size += len(html)
                texts.append(extract(Document(html, path.name, name, {"format": "html"})))
    return [text for text in texts if text.strip()], size


def seconds(function: Callable[[str], object], texts: Sequence[str]) -> float:
    """Return CPU seconds, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for text in texts:
            function(text)
        best = min(best, time.process_time() - start)
    return best


def rows(presidio: str | None = None) -> list[dict]:
    texts = list(sentences())
    ours = recall(
        texts, [[(s.start, s.end, s.kind) for s in find(t, kinds=KINDS)] for t, _ in texts]
    )
    theirs = recall(texts, presidio_spans(presidio, texts)) if presidio else {}
    counts = Counter(kind for _, labels in texts for _, _, kind in labels)
    table = [
        {
            "bar": f"personal data, recall: {kind}", "value": round(value, 4),
            "target": max(0.95, round(theirs.get(kind, 0), 4)), "unit": "share",
            "note": f"{counts[kind]} labels"
            + (f"; presidio's recogniser {theirs[kind]:.4f}" if kind in theirs else ""),
        }
        for kind, value in ours.items()
    ]  # fmt: skip
    misses: Counter[str] = Counter()
    vectors = list(stdnum_vectors())
    for module, word, number in vectors:
        text = f"My {word}: {number}."
        end = len(text) - 1
        spans = [(s.start, s.end, s.kind) for s in find(text, kinds=["national"])]
        labels = [(end - len(number), end, "national")]
        misses[module] += recall([(text, labels)], [spans])["national"] < 1
    table.append(
        {
            "bar": "national numbers after their name, tests of python-stdnum", "unit": "share",
            "value": round(1 - misses.total() / len(vectors), 4), "target": None,
            "note": f"{len(vectors)} numbers of {len(misses)} kinds; misses:"
            f" {', '.join(f'{m} {n}' for m, n in misses.most_common() if n)}",
        }
    )  # fmt: skip
    numbers = [text[a:b] for text, labels in texts for a, b, kind in labels if kind == "phone"]
    for name, regions in (("default regions", WEB_REGIONS), ("all regions", None)):
        hits = sum(bool(find(number, kinds=["phone"], regions=regions)) for number in numbers)
        table.append(
            {
                "bar": f"telephone numbers without a sentence, {name}", "unit": "share",
                "value": round(hits / len(numbers), 4), "target": None,
                "note": "no word says that they are telephone numbers",
            }
        )  # fmt: skip
    pages, html_bytes = documentation()
    found = [(span, text) for text in pages for span in find(text, kinds=KINDS)]
    for kind in KINDS:
        values = Counter(text[s.start : s.end] for s, text in found if s.kind == kind)
        examples = ", ".join(f"{value[:40]!r}" for value, _ in values.most_common(5))
        table.append(
            {
                "bar": f"found in {html_bytes / 1e6:.0f} MB of documentation: {kind}",
                "value": sum(values.values()), "target": None, "unit": "spans",
                "note": f"{len(values)} values: {examples}",
            }
        )  # fmt: skip
    never = re.compile(rf"{'|'.join(map(re.escape, NEVER))}|1[0-9]{{12}}")
    alarms = sum(never.fullmatch(text[s.start : s.end]) is not None for s, text in found)
    numbers = sum(len(never.findall(text)) for text in pages)
    table.append(
        {"bar": f"false alarms: {', '.join(NEVER)} and milliseconds", "value": alarms,
         "target": 0, "unit": "spans", "note": f"of {numbers} in {len(pages)} pages"}
    )  # fmt: skip
    size = sum(len(text.encode()) for text in pages) / 1e6
    for name, kinds in (("default kinds", DEFAULT_KINDS), ("all kinds", KINDS)):
        cpu = seconds(lambda text, kinds=kinds: replace(text, kinds=kinds), pages)
        table.append(
            {"bar": f"personal data, speed, {name}", "value": round(size / cpu, 1), "target": 20,
             "unit": "MB/s", "note": f"{1e3 * cpu / len(pages):.3f} ms a page of"
             f" {1e3 * size / len(pages):.1f} KB text"}
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presidio", metavar="PYTHON", help="interpreter with presidio-analyzer")
    arguments = parser.parse_args()
    print_rows(rows(arguments.presidio), ("phonenumbers", "python-stdnum", "faker", "resiliparse"))


if __name__ == "__main__":
    main()
