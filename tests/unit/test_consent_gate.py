"""Consent in a build: what the cleaner leaves out, and what a document carries."""

import hashlib

import pytest

from fastlm.data.clean import Cleaner
from fastlm.data.options import DataOptions
from fastlm.errors import InputError
from fastlm.sources.document import Document
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
    (result,) = Cleaner(DataOptions(rules=(), **options), (), policies)(document)
    return result


def refusal(*args, **kwargs):
    removal = clean(*args, **kwargs).removal
    return removal and (removal.step, removal.reason, removal.detail)


def test_a_refused_page_is_not_extracted_and_names_its_rule():
    result = clean(policies=[NO])
    assert (result.document.text, result.key) == ("", b"")
    assert (result.removal.step, result.removal.reason) == ("extract", "consent: robots.txt")
    assert result.removal.detail == "Disallow: /a (AI2Bot) [https://x.example/robots.txt, line 2]"


def test_modes():
    assert refusal(policies=[NO, YES])[1] == "consent: robots.txt"
    assert refusal(policies=[NO, YES], consent="strictest")[1] == "consent: robots.txt"
    assert refusal(policies=[NO, YES], consent="latest") is None
    assert refusal(policies=[NO, YES], consent="off") is None
    assert refusal(policies=[NO], crawlers=("CCBot",)) is not None
    other = PolicyFile(NO.url, NO.date, 200, "User-agent: CCBot\nDisallow: /\n")
    assert refusal(policies=[other], crawlers=("SomeBot",)) is None


def test_unknown():
    assert refusal() is None
    assert refusal(unknown="drop") == ("extract", "consent unknown: nothing said", "")
    assert refusal(policies=[YES], consent="latest", unknown="drop") is None


def test_a_document_carries_the_verdict():
    meta = clean(policies=[YES], consent="latest").document.meta
    assert meta == {
        "url": URL,
        "date": "2026-02-01T00:00:00Z",
        "consent": "yes",
        "consent_rule": f"Content-Signal: ai-train=yes (AI2Bot) [{YES.url}, line 2]",
    }
    assert clean().document.meta["consent"] == "unknown"
    assert "consent" not in clean(consent="off").document.meta
    plain = Document(TEXT, "1", "s", {"format": "text"})  # of a package: nobody to ask
    (result,) = Cleaner(DataOptions(rules=()))(plain)
    assert result.document.meta == {}


def test_page_and_headers_are_asked():
    assert refusal('<meta name="robots" content="noai">')[1] == "consent: noai"
    assert refusal(meta={"headers": {"tdm-reservation": "1"}})[1] == "consent: tdmrep"
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
        "extract",
        "opt-out",
        f"{path}, line 2: domain x.example",
    )
    extracted = clean().document.text
    path.write_text(hashlib.sha256(extracted.encode()).hexdigest())
    assert refusal(opt_out=(str(path),))[:2] == ("extract", "opt-out")
    assert refusal(opt_out=(str(path),), text=PAGE.format("").replace("fox", "cat")) is None


def test_licences():
    link = '<link rel="license" href="https://creativecommons.org/licenses/by/4.0/">'
    assert clean(link).document.meta["licence"] == "CC-BY-4.0"
    assert refusal(link, licences=("CC-BY-*",)) is None
    assert refusal(link, licences=("MIT",)) == ("extract", "licence: not in the list", "CC-BY-4.0")
    assert refusal(licences=("MIT",)) == ("extract", "licence: none stated", "")
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
