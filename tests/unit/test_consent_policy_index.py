"""The policy files of many sites in a database: the same answers as in memory."""

import random
from datetime import UTC, datetime

import pytest

from fastlm.data.consent import MODES, PolicyFile, PolicyIndex, decide, write_policies
from fastlm.data.consent import policy_index as module
from fastlm.errors import InputError

NOW = datetime(2026, 11, 30, tzinfo=UTC)
LICENCE = "https://licences.example/l.xml"


def rsl(term: str) -> str:
    start = '<rsl xmlns="https://rslstandard.org/rsl"><content url="/"><license>'
    return f'{start}<{term} type="usage">ai-train</{term}></license></content></rsl>'


def generate(rng: random.Random) -> list[PolicyFile]:
    texts = [
        "", "User-agent: *\nDisallow: /a\n", "User-agent: *\nContent-Signal: ai-train=yes\n",
        f"License: {LICENCE}\nUser-agent: *\nAllow: /\n", "\ud800\x00", "<html>",
    ]  # fmt: skip
    files = []
    for i in range(20):
        for _ in range(rng.randint(0, 4)):
            date = f"202{rng.randint(4, 7)}-0{rng.randint(1, 9)}-01T00:00:00Z"
            status = rng.choice([200, 200, 200, 404, 503])
            url = f"https://s{i}.example/robots.txt"
            files.append(PolicyFile(url, rng.choice([date, date, ""]), status, rng.choice(texts)))
    for term in ("permits", "prohibits"):
        files.append(PolicyFile(LICENCE, f"2026-0{rng.randint(1, 9)}-01", 200, rsl(term)))
    return files


def test_the_database_answers_like_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CACHED_SITES", 3)  # sites are read again
    rng, verdicts = random.Random(3), set()
    for round in range(3):
        files = generate(rng)
        path = tmp_path / f"ü {round}?.db"
        write_policies(path, iter(files))
        stored, listed = PolicyIndex.open(path, NOW), PolicyIndex(files, NOW)
        assert len(stored) == len(listed)
        for i in range(20):
            for mode in MODES:
                for date in ("2025-06-15T12:00:00Z", "2026-06-15", None):
                    url = f"http://s{i}.example/a"
                    options = {"date": date, "mode": mode, "crawler": "CCBot"}
                    decision = decide(url, policies=stored, **options)
                    assert decision == decide(url, policies=listed, **options)
                    verdicts.add((decision.verdict, decision.standard))
    assert verdicts >= {
        ("no", "robots.txt"),
        ("yes", "content-signal"),
        ("no", "rsl"),
        ("yes", "rsl"),
    }


def test_the_hash_depends_on_the_files_alone(tmp_path):
    files = generate(random.Random(1))
    before = write_policies(tmp_path / "a", files)
    assert write_policies(tmp_path / "b", [*reversed(files), *files]) == before
    changed = [*files[:-1], PolicyFile(files[-1].url, files[-1].date, 200, rsl("permits") + " ")]
    assert write_policies(tmp_path / "b", changed) != before
    assert write_policies(tmp_path / "c", []) != before
    assert not PolicyIndex.open(tmp_path / "c")
    fetches = (("a", "2026-03-01T00:00:00Z"), ("b", ""), ("b", "2026-02-01T00:00:00Z"))
    robots = [PolicyFile(f"https://{s}.example/robots.txt", date, 200, "") for s, date in fetches]
    summary = write_policies(tmp_path / "d", [*robots, *robots])
    assert {k: v for k, v in summary.items() if k != "sha256"} == {
        "files": 3, "sites": 2, "first": "2026-02-01T00:00:00Z", "last": "2026-03-01T00:00:00Z",
    }  # fmt: skip
    assert (
        decide("https://x.example/", policies=PolicyIndex.open(tmp_path / "c")).verdict == "unknown"
    )


def test_a_licence_of_a_site_with_a_longer_name_is_found():
    licence = "https://x.example.org/l.xml"
    robots = PolicyFile("https://x.example/robots.txt", "", 200, f"License: {licence}\n")
    index = PolicyIndex([robots, PolicyFile(licence, "", 200, rsl("prohibits"))])
    assert decide("https://x.example/a", date="2026-01-01", policies=index).standard == "rsl"


def test_refusals(tmp_path):
    (tmp_path / "text").write_text("no database " * 100)
    for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="expected policy files"):
            PolicyIndex.open(path)
    with pytest.raises(InputError):
        write_policies(tmp_path / "missing" / "a", [])
