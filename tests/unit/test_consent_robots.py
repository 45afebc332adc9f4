"""Groups of robots.txt against Google's parser, and the two libraries against each other."""

import json
import random
import time

import pytest

from fastlm.data.consent import path_matcher
from fastlm.data.consent import rsl as rsl_module
from fastlm.data.consent.path_matcher import (
    MAX_PATH,
    GoogleMatcher,
    ProtegoMatcher,
    normal_path,
    normal_pattern,
)
from fastlm.data.consent.robots import RobotsFile, path_statement, product_token
from fastlm.data.consent.rsl import RslDocument
from fastlm.data.consent.tdmrep import TdmFile, file_statement

PATTERNS = [
    "/", "/a", "/a/", "/a/b", "/a*", "/*.pdf$", "/a/$", "/b", "/a%20b", "/A", "/*?x=", "", "/a/b/c",
    "*", "/ü", "/%C3%BC", "a", "/index.html", "/*/", "$", "/%62",
]  # fmt: skip
PATHS = [
    "/", "/a", "/a/", "/a/b", "/a/b/c.pdf", "/x.pdf", "/x.pdf?q", "/b", "/a%20b", "/A", "/q?x=1",
    "/%C3%BC", "/a/?x=2", "/index.html",
]  # fmt: skip
NAMES = [
    "*", "GPTBot", "gptbot", "CCBot", "CCBot/2.0", "Google", "Googlebot", "OtherBot", "* x", "*x",
    "GPTBot, CCBot", "CC Bot", "",
]  # fmt: skip
AGENT_KEYS = ["User-agent", "user-agent", "Useragent", "User agent", " User-Agent "]
RULE_KEYS = ["Disallow", "Allow", "disallow ", " Allow", "Dissallow", "allowed", "Disallow-x"]
OTHERS = [
    "Crawl-delay: 5", "Content-Signal: ai-train=no", "Content-Usage: train-ai=n", "License: x:y",
    "Sitemap: x", "", "# note", "Disallow /a", "nonsense", "Allow: /a # x", "Host: x",
]  # fmt: skip


def generate(random: random.Random) -> str:
    lines = []
    for _ in range(random.randint(1, 4)):
        for _ in range(random.randint(1, 2)):
            lines.append(f"{random.choice(AGENT_KEYS)}: {random.choice(NAMES)}")
        for _ in range(random.randint(0, 5)):
            rule = f"{random.choice(RULE_KEYS)}: {random.choice(PATTERNS)}"
            lines.append(random.choice([rule, rule, random.choice(OTHERS)]))
    return random.choice(["\n", "\r\n", "\r"]).join(lines) + "\n"


def test_groups_are_those_of_googles_parser():
    robotstxt = pytest.importorskip("robotstxt")
    matcher, rng = robotstxt.RobotsMatcher(), random.Random(7)
    differences, disallowed = [], 0
    for _ in range(800):
        text = generate(rng)
        file = RobotsFile(text)
        for _ in range(5):
            path, crawler = rng.choice(PATHS), rng.choice(["GPTBot", "CCBot", "Googlebot", "ABot"])
            allowed = matcher.is_allowed(text, crawler, f"https://x.example{path}")
            (_, group), *others = file.groups((crawler,))
            line = group.disallows(normal_path(path))
            assert not others
            disallowed += line is not None
            if allowed != (line is None) or (line and line.number != matcher.matching_line):
                differences.append((text, crawler, path, allowed, line))
    assert differences == []
    assert disallowed > 500


def test_libraries_agree_on_the_rules_of_a_group():
    pytest.importorskip("robotstxt"), pytest.importorskip("protego")
    rng, differences, disallowed = random.Random(9), [], 0
    for _ in range(1500):
        patterns = [normal_pattern(p) for p in rng.choices(PATTERNS, k=rng.randint(1, 6)) if p]
        rules = [(rng.random() < 0.4, pattern) for pattern in patterns]
        path = normal_path(rng.choice(PATHS))
        google, protego = (m(rules).match(path) for m in (GoogleMatcher, ProtegoMatcher))
        disallowed += google is not None
        if google is None or protego is None:
            if google is not protego:
                differences.append((rules, path, google, protego))
        elif len(rules[google][1]) != len(rules[protego][1]):
            differences.append((rules, path, google, protego))
    assert differences == []
    assert disallowed > 300


def test_protego_takes_over_where_the_other_library_is_missing(monkeypatch):
    pytest.importorskip("protego")
    import importlib

    def import_module(name):
        if name == "robotstxt":
            raise ImportError(name)
        return original(name)

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", import_module)
    path_matcher.engine.cache_clear()
    try:
        assert path_matcher.engine() == "protego"
        assert isinstance(path_matcher.path_matcher([(False, "/")]), ProtegoMatcher)
    finally:
        monkeypatch.undo()
        path_matcher.engine.cache_clear()


def test_several_crawlers_get_each_group_once():
    text = "User-agent: a\nUser-agent: b\nDisallow: /x\n\nUser-agent: *\nDisallow: /y\n"
    groups = RobotsFile(text).groups(("b", "A", "c", "*", "d"))
    assert [crawler for crawler, _ in groups] == ["b", "*"]
    assert [[line.value for line in group.paths] for _, group in groups] == [["/x"], ["/y"]]


@pytest.mark.parametrize(
    "name, token",
    [("CCBot", "CCBot"), ("CCBot/2.0", "CCBot"), ("a b", "a"), ("*", "*"), ("/", ""), ("ü", "")],
)
def test_product_token(name, token):
    assert product_token(name) == token


def test_spelling_of_paths():
    assert normal_path("a?b#c") == normal_path("/a?b#c")
    assert normal_path("/%61%7e%2f") == "/a~%252F"
    assert normal_path("/ü b") == "/%C3%BC%20b"
    assert normal_path("/\ud800") == "/%ED%A0%80"
    assert normal_pattern("/a*$") == "/a*$"
    assert len(normal_path("/" + "a" * 10**6)) == MAX_PATH


def test_a_group_of_many_names_and_rules_stays_small():
    """500 KiB: 10,000 names for 20,000 rules, which would be 200 million lines for each name."""
    names = "".join(f"User-agent: bot{i}\n" for i in range(10_000))
    text = names + "".join(f"Disallow: /{i}\n" for i in range(20_000))
    started = time.process_time()
    file = RobotsFile(text)
    (_, group), *_ = file.groups(("bot",))
    assert time.process_time() - started < 2
    (_, group), *_ = file.groups(("bot99",))
    assert group.disallows("/777x").value == "/777"


def test_wildcards_cannot_stall():
    """The worst that a file can ask of a matcher, for a page with the longest address."""
    pattern = "/" + "*a" * (MAX_PATH // 2 - 4)
    text = "User-agent: *\n" + f"Disallow: {pattern}b$\n" * 20
    (_, group), *_ = RobotsFile(text).groups(("*",))
    started = time.process_time()
    assert group.disallows(normal_path("/" + "a" * 4000)) is None
    assert time.process_time() - started < 2


# ---- patterns that take long to match


def many(count: int) -> list[str]:
    return [f"/{i}*" + "a*" * 900 for i in range(count)]


def rsl(urls: list[str]) -> RslDocument:
    permits = '<license><permits type="usage">all</permits></license>'
    contents = "".join(f'<content url="{url}">{permits}</content>' for url in urls)
    return RslDocument(f'<rsl xmlns="https://rslstandard.org/rsl">{contents}</rsl>')


FILES = {
    "robots.txt": (
        lambda urls: RobotsFile("User-agent: x\n" + "".join(f"Allow: {u}\n" for u in urls)),
        lambda file, path: path_statement(file, "", path, ("x", "y")),
    ),
    "tdmrep.json": (
        lambda urls: TdmFile(json.dumps([{"location": u, "tdm-reservation": 0} for u in urls])),
        lambda file, path: file_statement(file, "", path),
    ),
    "rsl": (rsl, lambda file, path: file.statement("", "", "https://x.example", path, True)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_patterns_that_take_long_counts_as_no(kind):
    """At the limit a page takes a tenth of a second; beyond it, no time and no consent."""
    make, statement = FILES[kind]
    path = "/5" + "a" * 2000
    file = make(many(30))
    assert not file.problem
    begin = time.process_time()
    for _ in range(3):
        statement(file, path)
    assert time.process_time() - begin < 1.5  # 0.1 here; 240 patterns took 2 to 4
    file = make(many(240))
    consent = statement(file, path)
    assert "of patterns with *" in file.problem and consent and consent.verdict == "no"


def test_the_scopes_of_a_licence_are_computed_once(monkeypatch):
    """6,000 contents took 40 ms for each page of the site."""
    calls = []
    scope = rsl_module._scope
    monkeypatch.setattr(rsl_module, "_scope", lambda *a: calls.append(a) or scope(*a))
    document = rsl([f"/{i}/" for i in range(500)])
    for i in range(100):
        consent = document.statement("", "", "https://x.example", f"/{i}/page", False)
        assert consent and consent.verdict == "yes"
    assert document.statement("", "", "https://x.example", "/elsewhere", False) is None
    assert len(calls) == 500
