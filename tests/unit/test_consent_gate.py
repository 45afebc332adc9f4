"""Consent in a build: what the cleaner leaves out, and what a document carries."""

import hashlib
from collections import Counter
from itertools import count

import pytest
from warc_records import record

from fastlm.data.clean import Cleaner
from fastlm.data.consent import PolicyIndex, write_policies
from fastlm.data.options import DataOptions
from fastlm.errors import InputError
from fastlm.sources.document import Document, SourceFile
from fastlm.sources.scan import scan_file
from fastlm.sources.source_files import read_files
from fastlm.sources.warc import PolicyFile

URL = "https://x.example/a"
TEXT = "The quick brown fox jumps over the lazy dog. " * 20
PAGE = f"<html><head>{{}}</head><body><main><p>{TEXT}</p></main></body></html>"
NO = PolicyFile(
    "https://x.example/robots.txt", "2026-01-01T00:00:00Z", 200, "User-agent: *\nDisallow: /a\n"
)
SIGNAL = "User-agent: *\nContent-Signal: ai-train=yes\nAllow: /\n"
YES = PolicyFile("https://x.example/robots.txt", "2026-06-01T00:00:00Z", 200, SIGNAL)


def clean(head="", policies=(), text=None, meta=None, **options):
    """Return the cleaned document of a page of ``URL``, fetched in February 2026."""
    fields = {"format": "html", "url": URL, "date": "2026-02-01T00:00:00Z"} | (meta or {})
    document = Document(text or PAGE.format(head), "1", "s", fields)
    settings = {"rules": (), "language_method": "off", **options}
    (result,) = Cleaner(DataOptions(**settings), (), policies)(document)
    return result


def refusal(*args, **kwargs):
    removal = clean(*args, **kwargs).removal
    return removal and (removal.step, removal.reason, removal.detail)


def test_a_refused_page_is_not_extracted_and_names_its_rule():
    result = clean(policies=[NO])
    assert (result.document.text, result.key) == ("", b"")
    assert (result.removal.step, result.removal.reason) == ("consent", "robots.txt")
    assert result.removal.detail == (
        "Disallow: /a (User-agent: *) [https://x.example/robots.txt, line 2]"
    )


def test_modes():
    assert refusal(policies=[NO, YES])[1] == "robots.txt"
    assert refusal(policies=[NO, YES], consent="strictest")[1] == "robots.txt"
    assert refusal(policies=[NO, YES], consent="latest") is None
    assert refusal(policies=[NO, YES], consent="off") is None
    assert refusal(policies=[NO], crawlers=("CCBot",)) is not None
    other = PolicyFile(NO.url, NO.date, 200, "User-agent: CCBot\nDisallow: /\n")
    assert refusal(policies=[other], crawlers=("SomeBot",)) is None


def test_unknown():
    assert refusal() is None
    assert refusal(unknown="drop") == ("consent", "nothing said", "")
    assert refusal(policies=[YES], consent="latest", unknown="drop") is None


def test_a_document_carries_the_verdict():
    meta = clean(policies=[YES], consent="latest").document.meta
    assert meta == {
        "url": URL,
        "date": "2026-02-01T00:00:00Z",
        "consent": "yes",
        "consent_rule": f"Content-Signal: ai-train=yes (User-agent: *) [{YES.url}, line 2]",
    }
    assert clean().document.meta["consent"] == "unknown"
    assert "consent" not in clean(consent="off").document.meta
    plain = Document(TEXT, "1", "s", {"format": "text"})  # of a package: nobody to ask
    (result,) = Cleaner(DataOptions(rules=(), language_method="off"))(plain)
    assert result.document.meta == {}


def test_page_and_headers_are_asked():
    assert refusal('<meta name="robots" content="noai">')[1] == "noai"
    assert refusal(meta={"headers": {"tdm-reservation": "1"}})[1] == "tdmrep"
    assert refusal('<meta name="robots" content="noai">', meta={"url": None}) is not None


def test_unusable_metadata_is_no_fault():
    for meta in (
        {"url": 7},
        {"date": 7},
        {"headers": "x"},
        {"headers": {1: None}},
        {"headers": None, "url": "\ud800"},
    ):
        assert clean(meta=meta).removal is None
    assert clean(meta={"date": "2999-01-01"}, policies=[NO]).removal is not None


def test_opt_out(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("# note\ndomain: x.example\n")
    assert refusal(opt_out=(str(path),)) == (
        "consent",
        "opt-out",
        f"{path}, line 2: domain x.example",
    )
    extracted = clean().document.text
    path.write_text(hashlib.sha256(extracted.encode()).hexdigest())
    assert refusal(opt_out=(str(path),))[:2] == ("consent", "opt-out")
    assert refusal(opt_out=(str(path),), text=PAGE.format("").replace("fox", "cat")) is None


def test_licences():
    link = '<link rel="license" href="https://creativecommons.org/licenses/by/4.0/">'
    assert clean(link).document.meta["licence"] == "CC-BY-4.0"
    assert refusal(link, licences=("CC-BY-*",)) is None
    assert refusal(link, licences=("MIT",)) == ("consent", "licence: not in the list", "CC-BY-4.0")
    assert refusal(licences=("MIT",)) == ("consent", "licence: none stated", "")
    assert refusal(licences=("MIT",), meta={"license": "MIT"}) is None


def test_options():
    with pytest.raises(InputError, match="crawler: expected a product token"):
        DataOptions(crawlers=("?",)).check()
    with pytest.raises(InputError, match="opt_out: expected a file"):
        DataOptions(opt_out=("missing.txt",)).check()


def test_identity_changes_with_the_list(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("a.example\n")
    before = DataOptions(opt_out=(str(path),)).identity()
    assert "*" in before["crawler_names"]
    path.write_text("b.example\n")
    assert DataOptions(opt_out=(str(path),)).identity() != before


def test_an_archive_with_policy_files(tmp_path):
    """From WARC to cleaned documents: robots.txt, a licence and headers decide about the pages."""
    body = PAGE.format("").encode()
    licence = (
        '<rsl xmlns="https://rslstandard.org/rsl"><content url="/paid/"><license>'
        '<permits type="usage">all</permits><payment type="crawl"/></license></content></rsl>'
    )
    robots = "License: http://x.example/licence.xml\nUser-agent: *\nDisallow: /private/\n"

    def stored(path, data, kind="text/html", headers=()):
        url, date = f"http://x.example{path}", "2026-02-01T00:00:00Z"
        return record(next(numbers), data, kind, url=url, date=date, headers=headers)

    numbers = count()
    path = tmp_path / "a.warc"
    path.write_bytes(
        stored("/open", body)
        + stored("/private/1", body)
        + stored("/paid/1", body)
        + stored("/art", body, headers=("X-Robots-Tag: otherbot: noindex", "X-Robots-Tag: noai"))
        + stored("/robots.txt", robots.encode(), "text/plain")
        + stored("/licence.xml", licence.encode(), "application/rsl+xml")
    )
    file = SourceFile(path, "a.warc", str(tmp_path), "warc", explicit=True)
    scan = scan_file(file, unit_bytes=1 << 20)
    write_policies(tmp_path / "policies", scan.policies)
    index = PolicyIndex.open(tmp_path / "policies")
    cleaner = Cleaner(DataOptions(rules=()), (), index)
    results = {}
    for document in read_files([file], skipped=Counter()):
        (result,) = cleaner(document)
        results[result.document.meta["url"].removeprefix("http://x.example")] = result
    reasons = {url: r.removal.reason if r.removal else "" for url, r in results.items()}
    assert reasons == {
        "/open": "",
        "/private/1": "robots.txt",
        "/paid/1": "rsl",
        "/art": "noai",
    }
    assert results["/paid/1"].removal.detail == (
        '<permits type="usage">all</permits>, payment crawl '
        "[http://x.example/licence.xml, line 1 (http://x.example/robots.txt, line 1)]"
    )
    assert results["/open"].document.meta["consent"] == "unknown"
    assert "headers" not in results["/open"].document.meta


def test_nobody_is_asked_and_silence_is_a_no():
    with pytest.raises(InputError, match="unknown: expected keep, since consent is off"):
        DataOptions(consent="off", unknown="drop").check()
