"""`fastlm data prepare` with every option on: what each document carries, and why others went."""

import json
import random
import re
from collections import Counter
from itertools import count

import numpy as np
import pytest
from typer.testing import CliRunner
from warc_records import record

from fastlm.cli import app
from fastlm.data.clean import Cleaner
from fastlm.data.corpus import read_documents
from fastlm.data.options import DataOptions
from fastlm.data.personal import DEFAULT_KINDS, KINDS
from fastlm.data.prepare import prepare
from fastlm.data.quality import BUCKETS, DEFAULT_WEIGHTS, QualityModel
from fastlm.data.stage import describe_removals
from fastlm.data.text_classifier import Ngrams, TextClassifier
from fastlm.data.toxicity import ToxicityModel
from fastlm.data.unit_files import read_lines
from fastlm.errors import InputError
from fastlm.pipeline.funnel import Funnel
from fastlm.sources.document import Document
from fastlm.stages import load_recipe

SITE = "https://x.example"
LICENCE = "https://creativecommons.org/licenses/by/4.0/"
PAGE = "<html><head>{}</head><body><main>{}</main></body></html>"
NOUNS = {
    "en": "ladder kettle pencil bridge window basket candle mirror hammer violin".split(),
    "de": "Garten Himmel Bruder Wagen Schlüssel Winter Nachbar Lehrer Apfel Brunnen".split(),
    "fr": "jardin chemin frère voyage marché hiver voisin livre cheval bateau".split(),
    "es": "camino pueblo hermano viaje mercado invierno vecino libro caballo barco".split(),
}
SENTENCES = {
    "en": "The {} and the {} of the house were with the {}, and nobody knows why the {} is here.",
    "de": "Der {} und der {} sind im Haus bei dem {}, und niemand weiß, warum der {} da ist.",
    "fr": "Le {} et le {} sont dans la maison avec le {}, et personne ne sait où le {} est allé.",
    "es": "El {} y el {} están en la casa con el {}, y nadie sabe por qué el {} no está aquí.",
}
RUDE = "rotten filthy stupid ugly".split()
SPAM = "discount casino lottery jackpot".split()


def prose(language: str, seed: int, words=(), sentences: int = 12) -> str:
    """Return sentences, others for each ``seed``, with ``words`` between them."""
    draw = random.Random(f"{language} {seed}")
    lines = []
    for _ in range(sentences):
        lines.append(SENTENCES[language].format(*draw.sample(NOUNS[language], 4)))
        lines += [" ".join(words)] * bool(words)
    return " ".join(lines)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The paths of a quality and a toxicity model."""
    folder = tmp_path_factory.mktemp("models")
    plain = [prose(language, seed) for language in ("en", "de", "fr") for seed in range(5)]
    spam = [prose("en", seed, SPAM) for seed in range(15)]
    classifier = TextClassifier.fit([*plain, *spam], [True] * 15 + [False] * 15, Ngrams())
    borders = np.linspace(-1, 1, BUCKETS - 1)
    QualityModel(classifier, borders, DEFAULT_WEIGHTS, ()).save(folder / "quality")
    rude = [" ".join(RUDE[i % 4 :]) for i in range(15)]
    pieces = [" ".join(text.split()[:20]) for text in plain]
    classifier = TextClassifier.fit([*rude, *pieces], [True] * 15 + [False] * 15, Ngrams())
    ToxicityModel(classifier).save(folder / "toxicity")
    return folder / "quality", folder / "toxicity"


@pytest.fixture(scope="module")
def build(models, tmp_path_factory):
    """The documents and the records of removal, both by page, and the funnel."""
    folder = tmp_path_factory.mktemp("build")
    numbers = count()

    def stored(path, text, kind="text/html; charset=utf-8"):
        return record(next(numbers), text.encode(), kind, url=SITE + path)

    def page(name, text, licence=LICENCE):
        head = f'<link rel="license" href="{licence}">' if licence else ""
        return stored(f"/{name}", PAGE.format(head, f"<p>{text}</p>"))

    english, long_english = prose("en", 1), prose("en", 2, sentences=40)
    records = [
        stored("/robots.txt", "User-agent: *\nDisallow: /closed\n", "text/plain"),
        stored(
            "/.well-known/tdmrep.json",
            json.dumps([{"location": "/reserved", "tdm-reservation": 1}]),
            "application/json",
        ),
        page("english", f"{english} Write to ann@mail.org or call +1 212 555 2671."),
        page("german", prose("de", 1)),
        page("french", prose("fr", 1)),
        page("spanish", prose("es", 1)),
        page("long", long_english),
        page("near", f"{long_english} This sentence is new."),
        page("same", prose("de", 1)),
        page("closed", prose("en", 3)),
        page("reserved", prose("en", 4)),
        page("listed", prose("en", 5)),
        page("unlicensed", prose("en", 6), ""),
        page("noncommercial", prose("en", 7), "https://creativecommons.org/licenses/by-nc/4.0/"),
        page("short", "The kettle of the house."),
        page("empty", ""),
        page("rude", prose("en", 8, RUDE * 4)),
        page("spam", prose("en", 9, SPAM * 4)),
    ]
    archive, opt_out = folder / "a.warc", folder / "out.txt"
    archive.write_bytes(b"".join(records))
    opt_out.write_text(f"{SITE}/listed\n")
    quality, toxicity = models
    out = folder / "corpus"
    arguments = [
        "data", "prepare", archive, "--out", out, "--languages", "en,de,fr", "--quality", quality,
        "--min-quality-bucket", 3, "--toxicity", toxicity, "--max-toxicity", 0.8, "--scrub", "all",
        "--opt-out", opt_out, "--licences", "CC-BY-4.0", "--heldout-bytes", 0,
        "--extract", "precise",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    name = len(SITE) + 1
    documents = {d.meta["url"][name:]: d for d in read_documents(out, "train")}
    removed = {
        r["url"][name:]: r for part in sorted((out / "removed").iterdir()) for r in read_lines(part)
        if r["url"]
    }  # fmt: skip
    return documents, removed, Funnel.load(out), result.output


def test_every_document_carries_its_fields(build):
    documents = build[0]
    assert set(documents) == {"english", "german", "french", "near"}
    for name, document in documents.items():
        meta = document.meta
        assert set(meta) >= {
            "url", "date", "consent", "licence", "language", "language_probability", "quality",
            "quality_bucket", "toxicity", "cluster", "cluster_size",
        }, name  # fmt: skip
        assert meta["language"] == {"german": "de", "french": "fr"}.get(name, "en")
        assert 0.9 < meta["language_probability"] <= 1
        assert meta["quality_bucket"] == np.searchsorted(
            np.linspace(-1, 1, BUCKETS - 1), meta["quality"], side="right"
        )
        assert meta["quality_bucket"] >= 3 and 0 <= meta["toxicity"] < 0.8
        assert meta["licence"] == "CC-BY-4.0"
        assert meta["consent"] == "unknown"
        assert meta["cluster_size"] == (2 if name == "near" else 1)
    assert "<EMAIL_1> or call <PHONE_1>" in documents["english"].text


def test_every_removal_has_its_reason(build):
    removed = {name: (r["step"], r["reason"], r["detail"]) for name, r in build[1].items()}
    patterns = {
        "closed": (
            "consent",
            "robots.txt",
            rf"Disallow: /closed \(User-agent: [\w*]+\) \[{SITE}/robots.txt, line 2\]",
        ),
        "reserved": ("consent", "tdmrep", rf".*\[{SITE}/.well-known/tdmrep.json.*\]"),
        "listed": ("consent", "opt-out", ".*out.txt, line 1: url x.example/listed"),
        "unlicensed": ("consent", "licence: none stated", None),
        "noncommercial": ("consent", "licence: not in the list", "CC-BY-NC-4.0"),
        "empty": ("extract", "no text", None),
        "same": ("exact duplicates", "same text", "same text as .*a.warc .*"),
        "spanish": ("language", "es", r"probability [01]\.\d{3}"),
        "short": ("quality rules", "word_count", None),
        "spam": ("quality", "bucket 0", r"score -\d+\.\d{3}"),
        "rude": ("toxicity", "over the limit", r"score 0\.[89]\d*"),
        "long": ("near duplicates", "near duplicate", r"0\.[89]\d* like .*a.warc .*"),
    }
    assert set(removed) == set(patterns)
    for name, (step, reason, detail) in patterns.items():
        assert removed[name][:2] == (step, reason)
        assert (removed[name][2] is None) == (detail is None)
        assert detail is None or re.fullmatch(detail, removed[name][2]), removed[name]


def test_the_funnel_counts_every_step(build):
    _, removed, funnel, output = build
    steps = {s["step"]: (s["documents"], sum(s["removed"].values())) for s in funnel.steps}
    assert steps == {
        "gather": (16, 2), "consent": (11, 5), "extract": (10, 1), "exact duplicates": (9, 1),
        "language": (8, 1), "quality rules": (7, 1), "quality": (6, 1), "toxicity": (5, 1),
        "scrub": (5, 0), "near duplicates": (4, 1), "repeated paragraphs": (4, 0),
        "train": (4, 0), "heldout": (0, 0),
    }  # fmt: skip
    for s in funnel.steps[1:]:
        assert (
            Counter(r["reason"] for r in removed.values() if r["step"] == s["step"]) == s["removed"]
        )
    assert "2 policy records" in output and "1 e-mail address replaced" in output


def page_file(path, text):
    path.write_text(PAGE.format("", f"<p>{text}</p>"))
    return str(path)


def test_pages_that_precise_leaves_to_fast_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.data.extract.MAX_PRECISE_LENGTH", 10_000)
    sources = [
        page_file(tmp_path / f"{seed}.html", prose("en", seed, sentences=sentences))
        for seed, sentences in enumerate((10, 200))
    ]
    options = DataOptions(extract="precise", heldout_bytes=0)
    funnel = prepare(sources, tmp_path / "out", options=options, cache=tmp_path)
    step = next(s for s in funnel.steps if s["step"] == "extract")
    assert step["documents"] == 2 and step["fallbacks"] == {"too large for precise": 1}
    assert describe_removals(step) == ["1 page extracted fast: too large for precise"]


def test_options_that_are_off_leave_no_fields(tmp_path):
    source = page_file(tmp_path / "a.html", prose("en", 1))
    options = DataOptions(language_method="off", scrub=(), heldout_bytes=0)
    funnel = prepare([source], tmp_path / "out", options=options, cache=tmp_path)
    (document,) = read_documents(tmp_path / "out", "train")
    assert set(document.meta) == {"cluster", "cluster_size"}
    assert not {"language", "quality", "toxicity"} & {s["step"] for s in funnel.steps}


def test_parts_of_a_document_share_the_numbers_of_placeholders():
    texts = ["Ann (ann@mail.org) wrote. " * 9, "Bob (bob@mail.org) and ann@mail.org. " * 9]
    document = Document("\n\n".join(texts), "1", "s", {"format": "text"})
    first, second = Cleaner(DataOptions(rules=(), max_words=40))(document)
    assert set(re.findall("<.*?>", first.document.text)) == {"<EMAIL_1>"}
    assert second.document.text.startswith("Bob (<EMAIL_2>) and <EMAIL_1>.")


@pytest.mark.parametrize("value", [True, False, ["email", "national"], ["all"], ["none"]])
def test_kinds_of_personal_data_in_a_recipe(tmp_path, value):
    recipe = tmp_path / "r.toml"
    stage = f'[[stage]]\nkind = "data"\nsources = ["x"]\nscrub = {json.dumps(value)}\n'
    recipe.write_text(f'name = "r"\n{stage}')
    (step,) = load_recipe(recipe).steps
    assert step.stage.scrub == {
        "true": DEFAULT_KINDS, "false": (), '["all"]': KINDS, '["none"]': (),
    }.get(json.dumps(value), ("email", "national"))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scrub": ("name",)}, "scrub: expected names among key, email"),
        ({"regions": ("XX",)}, "regions: expected codes"),
        (
            {"languages": ("english",)},
            "languages: expected ISO 639 codes such as en, got 'english'",
        ),
        ({"languages": ("en",), "language_method": "off"}, "languages: expected a method"),
        ({"min_quality_bucket": 3}, "quality: expected a model, which min_quality_bucket needs"),
        ({"max_toxicity": 0.5}, "toxicity: expected a model, which max_toxicity needs"),
        ({"quality": "nowhere"}, "quality: expected a file, got nowhere"),
        ({"toxicity": "nowhere"}, "toxicity: expected a file, got nowhere"),
        ({"quality": __file__, "min_quality_bucket": 20}, "min_quality_bucket: expected 0 to 19"),
        ({"toxicity": __file__, "max_toxicity": -1.0}, "max_toxicity: expected 0 to 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        DataOptions(**options).check()


def test_another_model_is_another_build(models, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(models[0].read_bytes())
    before = DataOptions(quality=str(path)).identity()
    with open(path, "ab") as file:
        file.write(b" ")
    assert DataOptions(quality=str(path)).identity() != before


def test_documents_cleaned_together_and_alone_are_equal():
    texts = [prose("de", 1), "", prose("en", 2, ["me@mail.org"]), "too short", prose("fr", 3)]
    documents = [Document(text, str(i), "s", {"format": "text"}) for i, text in enumerate(texts)]
    cleaner = Cleaner(DataOptions(max_words=100))
    together = cleaner.clean(documents)
    assert together == [cleaner(document) for document in documents]
    assert [len(results) for results in together] == [3, 1, 3, 1, 3]
