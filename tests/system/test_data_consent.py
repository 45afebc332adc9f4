"""`fastlm data prepare` on an archive whose site says who may use its pages."""

from itertools import count

import pytest
from typer.testing import CliRunner
from warc_records import record

from fastlm.cli import app
from fastlm.data.corpus import read_documents
from fastlm.pipeline.funnel import Funnel

SITE = "http://x.example"
BODY = "<html><head>{}</head><body><main>{}</main></body></html>"


@pytest.fixture
def archive(tmp_path):
    """An archive of five pages, with robots.txt of two dates and a page that says noai."""
    numbers = count()

    def stored(path, text, kind="text/html", date="2026-02-01T00:00:00Z"):
        url = SITE + path
        return record(next(numbers), text.encode(), kind, url=url, date=date)

    def page(name, head=""):
        words = " ".join(f"The {name} page has sentence {i} of its own text." for i in range(30))
        return stored(f"/{name}", BODY.format(head, f"<p>{words}</p>"))

    old = "User-agent: *\nDisallow: /closed\nContent-Signal: /free ai-train=yes\n"
    path = tmp_path / "a.warc"
    path.write_bytes(
        stored("/robots.txt", old, "text/plain")
        + page("open")
        + page("closed")
        + page("free")
        + page("art", '<meta name="robots" content="noai">')
        + page("later")
        + stored("/robots.txt", "User-agent: *\nDisallow: /later\n", "text/plain", "2026-05-01")
        + stored("/ai.txt", "<!DOCTYPE html><p>Not found", "text/html")
    )
    return path


def build(archive, out, *options):
    """Run the command. Return (documents by page, removed records by page)."""
    arguments = ["data", "prepare", str(archive), "--out", str(out), "--heldout-bytes", "0"]
    result = CliRunner().invoke(app, [*arguments, "--rules", "none", *options])
    assert result.exit_code == 0, result.output
    name = len(SITE) + 1
    documents = {d.meta["url"][name:]: d.meta for d in read_documents(out, "train")}
    removed = next(s for s in Funnel.load(out).steps if s["step"] == "consent")["removed"]
    return documents, removed


def test_modes(archive, tmp_path):
    documents, removed = build(archive, tmp_path / "a")
    assert set(documents) == {"open", "free", "later"}
    assert removed == {"noai": 1, "robots.txt": 1}
    assert documents["free"]["consent"] == "yes"
    assert documents["free"]["consent_rule"].endswith(f"[{SITE}/robots.txt, line 3]")
    assert documents["open"]["consent"] == "unknown"
    assert set(build(archive, tmp_path / "b", "--consent", "latest")[0]) == {
        "open", "closed", "free",
    }  # fmt: skip
    assert set(build(archive, tmp_path / "c", "--consent", "strictest")[0]) == {"open", "free"}
    assert len(build(archive, tmp_path / "d", "--consent", "off")[0]) == 5
    documents, removed = build(archive, tmp_path / "e", "--unknown", "drop")
    assert set(documents) == {"free"}
    assert removed == {"noai": 1, "nothing said": 2, "robots.txt": 1}


def test_opt_out_and_what_was_removed(archive, tmp_path):
    path, out = tmp_path / "out.txt", tmp_path / "a"
    path.write_text(f"# asked for in May\n{SITE}/open\n")
    documents, removed = build(archive, out, "--opt-out", str(path), "--crawlers", "SomeBot")
    assert set(documents) == {"free", "later"}
    assert removed == {"noai": 1, "opt-out": 1, "robots.txt": 1}
    path.write_text(f"# nobody any more\n# {SITE}/open\n")  # another list is another build
    assert "open" in build(archive, out, "--opt-out", str(path))[0]
    assert "ai.txt: a page, not a policy" in (out / "funnel.json").read_text()
