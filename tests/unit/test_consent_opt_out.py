"""Lists of who asked to be left out."""

import gzip
import hashlib
import json
import time

import pytest

from fastlm.data.consent import OptOut
from fastlm.data.forget_log import text_key
from fastlm.errors import InputError

TEXT = "A text that somebody wants back."
SHA = hashlib.sha256(TEXT.encode()).hexdigest()
LINES = f"""# asked for on 2026-05-01
domain: example.com   # with subdomains
*.wild.example

url: https://site.example/blog/
https://site.example/user1
other.example/docs
repository: https://github.com/Owner/Name.git
author:  Jane   Doe
hash: sha256:{SHA}
MÜNCHEN.example
"""


@pytest.fixture
def lists():
    return OptOut.of_lines(LINES.splitlines(), "out.txt")


@pytest.mark.parametrize(
    "document, line",
    [
        ({"url": "https://example.com/a"}, "line 2: domain example.com"),
        ({"url": "http://www.Example.COM:80/a?b"}, "line 2: domain example.com"),
        ({"url": "<https://example.com/a>"}, "line 2: domain example.com"),
        ({"url": "https://notexample.com/"}, None),
        ({"url": "https://example.com.evil.example/"}, None),
        ({"url": "https://a.wild.example"}, "line 3: domain wild.example"),
        ({"url": "https://site.example/blog/1"}, "line 5: url site.example/blog/"),
        ({"url": "http://site.example/blog/"}, "line 5: url site.example/blog/"),
        ({"url": "https://site.example/Blog/1"}, None),
        ({"url": "https://site.example/blog"}, None),
        ({"url": "https://site.example/user1"}, "line 6: url site.example/user1"),
        ({"url": "https://site.example/user1/x"}, "line 6: url site.example/user1"),
        ({"url": "https://site.example/user1?x"}, "line 6: url site.example/user1"),
        ({"url": "https://site.example/user10"}, None),
        ({"url": "https://other.example/docs/1"}, "line 7: url other.example/docs"),
        ({"url": "https://github.com/owner/name/blob/x.py"}, "line 8: repository"),
        ({"repository": "owner/name"}, "line 8: repository github.com/owner/name"),
        ({"repository": "git@github.com:owner/name.git"}, "line 8: repository"),
        ({"repository": "owner/name2"}, None),
        ({"author": "jane doe"}, "line 9: author jane doe"),
        ({"authors": ["A", "Jane Doe"]}, "line 9: author jane doe"),
        ({"author": "Jane"}, None),
        ({"sha256": SHA.upper()}, f"line 10: hash {SHA}"),
        ({"url": "https://xn--mnchen-3ya.example/"}, "line 11: domain xn--mnchen-3ya.example"),
        ({}, None),
        ({"url": 7, "author": None, "authors": None, "sha256": 1}, None),
    ],
)
def test_match(lists, document, line):
    match = lists.match(document)
    assert match == line or (line and match and match.startswith(f"out.txt, {line}"))


def test_match_by_text(lists):
    assert lists.match({}, TEXT) == f"out.txt, line 10: hash {SHA}"
    assert lists.match({}, TEXT + ".") is None
    forgotten = OptOut.of_lines([text_key(TEXT)])  # as `fastlm data forget` writes it
    assert forgotten.match({}, f"  {TEXT.upper()}") is not None
    assert lists.match({}, "\ud800") is None


def test_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(LINES)
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbfpacked.example\r\n"))
    rows = [{"domain": "rows.example"}, {"url": "https://r.example/a", "author": "Rita"}]
    table = tmp_path / "c.jsonl"
    table.write_text("# note\n" + "".join(json.dumps(row) + "\n" for row in rows))
    toml = tmp_path / "d.toml"
    toml.write_text('# note\ndomains = [\n  "toml.example",\n]\nrepositories = ["o/r"]\n')
    lists = OptOut.load(text, packed, table, toml)
    assert (len(lists), lists.problems) == (9 + 1 + 3 + 2, [])
    for url, entry in [
        ("https://packed.example", f"{packed}, line 1: domain packed.example"),
        ("https://rows.example", f"{table}, line 2: domain rows.example"),
        ("https://r.example/a/b", f"{table}, line 3: url r.example/a"),
        ("https://toml.example", f"{toml}, line 3: domain toml.example"),
        ("https://github.com/O/R", f"{toml}, line 5: repository github.com/o/r"),
    ]:
        assert lists.match({"url": url}) == entry
    assert lists.match({"author": "rita"}) == f"{table}, line 3: author rita"


def test_lines_that_are_no_entries_are_counted_and_named(tmp_path):
    path = tmp_path / "a.txt"
    long = "domain: " + "a" * 1_000_000 + ".example"
    path.write_bytes(
        f"domain: good.example\nnonsense\ndomain: no spaces.example\n{long}\n".encode()
        + b"hash: 12\n\xff\xfe.example\nurl: /path\nlast.example\n"
    )
    lists = OptOut.load(path)
    assert len(lists) == 2
    assert lists.match({"url": "https://last.example"}) == f"{path}, line 8: domain last.example"
    assert lists.problem_count == 6
    assert [p.removeprefix(f"{path}, line ").split(":")[0] for p in lists.problems] == list(
        "234567"
    )
    many = OptOut.of_lines(["nonsense"] * 1000)
    assert (many.problem_count, len(many.problems)) == (1000, 100)


def test_refusals(tmp_path):
    for name, data, message in [
        ("a.txt", b"nonsense\n", "expected entries such as domain: x.org"),
        ("a.jsonl", b'{"x": 1}\n[]\n{"domain": 1}\n' + b"[" * 5000, "expected entries"),
        ("a.toml", b"domains = [", "expected TOML"),
        ("a.txt.gz", gzip.compress(b"a.example\n" * 1000)[:-10], "."),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            OptOut.load(path)
    with pytest.raises(InputError, match="expected a file, got none"):
        OptOut.load(tmp_path / "missing.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("# nobody yet\n")
    assert len(OptOut.load(empty)) == 0


def test_speed():
    """A match takes microseconds with 150,000 entries."""
    lines = [f"d{i}.example" for i in range(50_000)]
    lines += [f"https://s{i}.example/path{i}/" for i in range(50_000)]
    lines += [f"author: Writer {i}" for i in range(50_000)]
    lists = OptOut.of_lines(lines)
    assert len(lists) == 150_000
    document = {"url": "https://www.site.example/a/long/path/to/a/page.html?x=1", "author": "A B"}
    started = time.process_time()
    for _ in range(3000):
        assert lists.match(document) is None
    assert (time.process_time() - started) / 3000 < 200e-6
    assert lists.match({"url": "https://s49999.example/path49999/x"}).startswith(
        "opt-out, line 100000"
    )
