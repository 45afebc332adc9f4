"""The decision: standards together, dates, hostile files, speed."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from fastlm.data.consent import (
    MODES,
    Consent,
    PolicyFile,
    PolicyIndex,
    all_crawlers,
    count_verdicts,
    decide,
    default_crawlers,
    policies_at,
    policy_problems,
    statements,
)
from fastlm.data.consent.policy_files import (
    MAX_SNAPSHOTS,
    ParseCache,
    file_kind,
    parse_date,
)
from fastlm.data.consent.rsl import MAX_DEPTH, RslDocument
from fastlm.errors import InputError

SITE = "https://x.example"
PAGE = f"{SITE}/a"
ROBOTS = f"{SITE}/robots.txt"
NO, YES = "User-agent: *\nDisallow: /\n", "User-agent: *\nContent-Signal: ai-train=yes\n"
NOW = datetime(2026, 11, 30, tzinfo=UTC)


def test_the_answer_names_rule_and_line():
    text = "# rules\nUser-agent: CCBot\nDisallow: /a  # private\n"
    assert decide(
        PAGE, date=None, headers={}, html="", policies={ROBOTS: text}, crawler="CCBot"
    ) == Consent("no", "robots.txt", "Disallow: /a (User-agent: CCBot)", f"{ROBOTS}, line 3")


@pytest.mark.parametrize("policies", [{"robots.txt": NO}, {"/robots.txt": NO}, {ROBOTS: b"x"}])
def test_policies_that_would_not_count(policies):
    with pytest.raises(InputError, match="policies: expected"):
        decide(PAGE, policies=policies)


def test_nothing_said():
    expected = Consent("unknown", "", "", "")
    assert decide(PAGE, date=None, headers={}, html="", policies={}, crawler="CCBot") == expected
    assert decide(PAGE) == expected
    allowed = {ROBOTS: "User-agent: *\nAllow: /\n"}  # may be fetched, which is no consent
    assert decide(PAGE, policies=allowed, crawler="CCBot") == expected


def test_the_most_restrictive_standard_wins():
    html = '<head><meta name="robots" content="noai"></head>'
    tdm = {f"{SITE}/.well-known/tdmrep.json": '[{"location": "/", "tdm-reservation": 0}]'}
    policies = {ROBOTS: YES} | tdm
    assert decide(PAGE, policies=policies, crawler="CCBot").verdict == "yes"
    assert decide(PAGE, policies=policies, html=html, crawler="CCBot").standard == "noai"
    names = [s.standard for s in statements(PAGE, policies=policies, html=html, crawler="CCBot")]
    assert names == ["content-signal", "tdmrep", "noai"]


def test_a_condition_outweighs_yes_and_not_no():
    licence = f"{SITE}/l.xml"
    text = (
        '<rsl xmlns="https://rslstandard.org/rsl"><content url="/"><license>'
        '<permits type="usage">all</permits><payment type="attribution"/>'
        "</license></content></rsl>"
    )
    policies = {ROBOTS: f"License: {licence}\n{YES}", licence: text}
    decision = decide(PAGE, policies=policies, crawler="CCBot")
    assert (decision.verdict, decision.standard) == ("unknown", "rsl")
    assert decide(PAGE, policies=policies, headers={"x-robots-tag": "noai"}).verdict == "no"


def test_headers_of_any_shape():
    shapes = [
        {"X-ROBOTS-TAG": "noindex, noai"},
        {"x-robots-tag": ["noindex", "noai"]},
        {"x-robots-tag": "otherbot: noindex\nnoai"},
        {"x-robots-tag": ["otherbot: noindex", "noai"]},
        [("X-Robots-Tag", "noindex"), ("X-Robots-Tag", "noai")],
    ]
    for headers in shapes:
        assert decide(PAGE, headers=headers).source == "header X-Robots-Tag"
    joined = {"X-Robots-Tag": "otherbot: noindex, noai"}  # all of it for the other crawler
    assert decide(PAGE, headers=joined).verdict == "unknown"


def test_page_as_bytes():
    html = b'<html><head><meta name="robots" content="noai">\xff</head>'
    assert decide(PAGE, html=html).source == "html meta robots"


@pytest.mark.parametrize(
    "url",
    [
        "http://x.example/a",
        "https://X.EXAMPLE:443/a",
        "https://user:password@x.example/a#part",
        "<https://x.example/a>",  # as GNU wget writes it
    ],
)
def test_the_file_belongs_to_the_site(url):
    assert decide(url, policies={ROBOTS: NO}).verdict == "no"


@pytest.mark.parametrize("url", ["https://y.example/", "https://x.example:8080/", "a/b", "", "x:y"])
def test_the_file_of_another_site_does_not_count(url):
    assert decide(url, policies={ROBOTS: NO}) == Consent("unknown")


def test_default_crawlers_are_a_dated_list():
    names = default_crawlers()
    assert {"GPTBot", "CCBot", "Google-Extended", "AI2Bot", "*"} <= set(names) < set(all_crawlers())
    for name in names:
        text = f"User-agent: {name}\nDisallow: /\n"
        assert decide(PAGE, policies={ROBOTS: text}).verdict == "no", name
    other = {ROBOTS: "User-agent: OtherBot\nDisallow: /\n"}
    assert decide(PAGE, policies=other).verdict == "unknown"
    assert decide(PAGE, policies=other, crawler=["CCBot", "OtherBot"]).verdict == "no"


@pytest.mark.parametrize("crawler", ["", "/2.0", [], ["CCBot", ""], ["a"] * 101])
def test_a_crawler_needs_a_product_token(crawler):
    with pytest.raises(InputError, match=r"crawler: expected"):
        decide(PAGE, crawler=crawler)


# dates


def fetched(date, text, status=200, address=ROBOTS):
    return PolicyFile(address, date, status, text)


HISTORY = [
    fetched("2026-01-10", NO),
    fetched("2025-01-10T00:00:00Z", YES),
    fetched("2026-06-10", ""),
]


@pytest.mark.parametrize("form", [list, PolicyIndex])
@pytest.mark.parametrize(
    "mode, date, verdict",
    [
        ("as-crawled", "2025-02-01", "yes"),
        ("as-crawled", "2026-01-10T00:00:00Z", "no"),
        ("as-crawled", "2026-07-01", "unknown"),
        ("as-crawled", "2025-01-01", "yes"),  # none before, one 9 days later
        ("as-crawled", "2024-01-01", "unknown"),  # none before, and the next is of another crawl
        ("as-crawled", None, "no"),  # no date: the strictest
        ("as-crawled", "last summer", "no"),
        ("as-crawled", "2999-01-01", "unknown"),  # the future means now
        ("latest", "2025-02-01", "unknown"),
        ("latest", None, "unknown"),
        ("strictest", "2025-02-01", "no"),
    ],
)
def test_modes(mode, date, verdict, form):
    decision = decide(PAGE, date=date, policies=form(HISTORY), crawler="CCBot", mode=mode)
    assert decision.verdict == verdict


@pytest.mark.parametrize("form", [list, PolicyIndex])
def test_strictest_keeps_files_together_that_were_valid_together(form):
    """The licence that robots.txt named in January was replaced in June; both states count."""
    licence = "https://licences.example/l.xml"

    def text(term):
        start = '<rsl xmlns="https://rslstandard.org/rsl"><content url="/"><license>'
        return f'{start}<{term} type="usage">ai-train</{term}></license></content></rsl>'

    files = [
        fetched("2026-01-01", f"License: {licence}\n"),
        fetched("2026-01-01", text("permits"), address=licence),
        fetched("2026-06-01", text("prohibits"), address=licence),
        fetched("2026-07-01", ""),
    ]
    files = form(files)
    decision = decide(PAGE, date="2026-02-01", policies=files, mode="strictest")
    assert (decision.verdict, decision.standard) == ("no", "rsl")
    assert decide(PAGE, date="2026-02-01", policies=files, mode="as-crawled").verdict == "yes"
    assert decide(PAGE, date="2026-02-01", policies=files, mode="latest").verdict == "unknown"


def test_dates_in_the_future_do_not_count():
    files = [fetched("2026-01-01", NO), fetched("2031-01-01", YES)]
    for mode in MODES:
        snapshots = policies_at(files, "2026-02-01", mode, now=NOW)
        assert [snapshot[ROBOTS].text for snapshot in snapshots] == [NO]
    only = policies_at([fetched("2031-01-01", NO)], "2026-11-20", "as-crawled", now=NOW)
    assert only[0][ROBOTS].text == NO  # means now, within the same crawl
    assert policy_problems(files, now=NOW) == [
        f"{ROBOTS}: date in the future, 2031-01-01T00:00:00+00:00"
    ]


@pytest.mark.parametrize("form", [list, PolicyIndex])
def test_a_file_that_could_not_be_read_leaves_the_one_before(form):
    files = [fetched("2026-01-01", YES), fetched("2026-02-01", "", 503)]
    for mode in MODES:
        decision = decide(PAGE, date="2026-02-02", policies=form(files), mode=mode)
        assert decision.verdict == "yes"
    assert decide(PAGE, date="2026-02-02", policies=form(files[1:])).verdict == "no"


def test_index_of_many_sites():
    sites = [f"https://s{i}.example/robots.txt" for i in range(50)]
    files = [fetched("2026-01-01", NO, address=a) for a in sites[::2]]
    index = PolicyIndex(files, NOW)
    assert len(index) == 25
    for i in range(50):
        for mode in MODES:
            url = f"http://user@s{i}.example:80/a"
            decision = decide(url, date="2026-01-02", policies=index, mode=mode)
            assert decision.verdict == ("unknown" if i % 2 else "no"), (i, mode)
    with pytest.raises(InputError, match="consent: expected one of"):
        decide(PAGE, policies=index, mode="newest")


def test_many_changes_are_sampled():
    files = [
        fetched(f"{NOW - timedelta(days=i):%Y-%m-%d}", f"User-agent: *\nDisallow: /{i}\n")
        for i in range(500)
    ]
    snapshots = policies_at(files, None, "strictest", now=NOW)
    assert len(snapshots) <= MAX_SNAPSHOTS + 1
    assert snapshots[0][ROBOTS].text.endswith("/499\n")
    assert snapshots[-1][ROBOTS].text.endswith("/0\n")


def test_parse_date():
    assert parse_date("2026-01-02T03:04:05Z") == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert parse_date(datetime(2026, 1, 2)) == datetime(2026, 1, 2, tzinfo=UTC)
    assert parse_date("") is parse_date(None) is parse_date("soon") is None


def test_unknown_mode():
    with pytest.raises(InputError, match="consent: expected one of as-crawled"):
        policies_at([], None, "newest")


# hostile files

BOMB = (
    '<?xml version="1.0"?><!DOCTYPE rsl [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY a{i} "{"&a;" * 10}">' for i in range(9))
    + ']><rsl xmlns="https://rslstandard.org/rsl"><content url="/">&a8;</content></rsl>'
)
EXTERNAL = (
    '<!DOCTYPE rsl [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    '<rsl xmlns="https://rslstandard.org/rsl"><content url="&x;"/></rsl>'
)
DEEP = f'<rsl xmlns="https://rslstandard.org/rsl">{"<a>" * (MAX_DEPTH + 1)}'
WIDE = f'<rsl xmlns="https://rslstandard.org/rsl">{"<content/>" * 30_000}</rsl>'


@pytest.mark.parametrize(
    "text, problem",
    [
        (BOMB, "declares an entity"),
        (EXTERNAL, "declares an entity"),
        (DEEP, "more than 64 levels"),
        (WIDE, "more than 64 levels or 20,000 elements"),
        ("<rsl", "not XML"),
        ("", "not XML"),
        ("License", "not XML"),
        ("<html><p>404</p></html>", "no <content>"),
        ("<rsl>" + " " * 2_000_000, "more than 1,048,576"),
        ("<rsl>\x00</rsl>", "not XML"),
        ("<rsl>\ud800</rsl>", "no <content>"),
    ],
)
def test_hostile_licences(text, problem):
    document = RslDocument(text)
    assert problem in document.problem
    assert document.contents == []


def test_licences_that_refer_to_each_other_are_followed_once():
    a, b = f"{SITE}/a.xml", f"{SITE}/b.xml"

    def text(other):
        return (
            '<rsl xmlns="https://rslstandard.org/rsl"><content url="/"><license>'
            f'<permits type="usage">all</permits><payment><standard>{other}</standard></payment>'
            f"</license><terms>{other}</terms></content></rsl>"
        )

    policies = {ROBOTS: f"License: {a}\nLicense: {b}\n", a: text(b), b: text(a)}
    assert decide(PAGE, policies=policies).verdict == "unknown"
    html = f'<head><link rel="license" type="application/rsl+xml" href="{PAGE}"></head>'
    policies[PAGE] = html  # a page that is its own licence
    assert decide(PAGE, policies=policies, html=html).verdict == "unknown"


ERROR = "<!DOCTYPE html>\n<html><body>Not found\nUser-agent: *\nDisallow: /\n</body></html>"


@pytest.mark.parametrize("path", ["/robots.txt", "/ai.txt", "/.well-known/tdmrep.json"])
@pytest.mark.parametrize("text", [ERROR, f"\ufeff \n{ERROR}", ERROR.lower(), f"<!-- x -->{ERROR}"])
def test_a_page_is_no_policy(path, text):
    policies = {SITE + path: text}
    assert decide(PAGE, policies=policies) == Consent("unknown")
    assert policy_problems(policies) == [f"{SITE}{path}: a page, not a policy"]


def test_problems_are_named():
    policies = {
        ROBOTS: NO + "#" * 600_000,
        f"{SITE}/.well-known/tdmrep.json": "[" * 100_000,
        f"{SITE}/ai.txt": "x" * 300_000,
        f"{SITE}/l.xml": "<rsl>",
        f"{SITE}/m.xml": PolicyFile(f"{SITE}/m.xml", "", 500, ""),
    }
    problems = policy_problems(policies)
    assert [problem.partition(": ")[2].split(":")[0] for problem in problems] == [
        "600,026 characters",
        "not a JSON array",
        "300,000 characters, more than 262,144",
        "not XML",
        "status 500",
    ]
    assert policy_problems({ROBOTS: NO}) == []


def test_status_of_robots():
    for status, verdict in [(200, "no"), (301, "unknown"), (404, "unknown"), (503, "no")]:
        policies = {ROBOTS: fetched("", NO, status)}
        assert decide(PAGE, policies=policies).verdict == verdict
    assert "status 503" in decide(PAGE, policies={ROBOTS: fetched("", "", 503)}).rule


def test_kinds_of_files():
    kinds = {
        ROBOTS: "robots",
        f"{SITE}/ai.txt": "ai_txt",
        f"{SITE}/.well-known/ai.txt": "ai_txt",
        f"{SITE}/.well-known/tdmrep.json": "tdmrep",
        f"{SITE}/docs/robots.txt": "rsl",
        f"{SITE}/licence.xml": "rsl",
    }
    assert {address: file_kind(address) for address in kinds} == kinds


@pytest.mark.parametrize(
    "html",
    [
        "<meta name=robots content=noai>" * 3000,
        "<head>" + "<div>" * 20_000 + "noai",
        "<head>" + "".join(f"<b a={i}>" for i in range(4000)) + "<p>" * 9000 + "noai",
        "<head>" + "<script>" * 9000 + "noai",
        "<head noai " + " ".join(f"a{i}=1" for i in range(9000)),
        "\x00<head>\ud800noai",
        b"\xff\xfe<head>noai",
        "<" * 60_000 + "noai",
    ],
)
def test_hostile_pages(html):
    started = time.process_time()
    decide(PAGE, html=html)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "value",
    [
        "<" * 100_000,
        "<a>" + '; rel="license' * 5000,
        "<a>" + ";a=b" * 20_000,
        "<x>; rel=license; type=application/rsl+xml" + ";" * 10_000,
        "noai:" * 10_000,
        "," * 100_000,
        "train-ai" + ";a" * 50_000,
        "\ud800\x00",
    ],
)
def test_hostile_headers(value):
    names = ("Link", "X-Robots-Tag", "Content-Usage", "Content-Signal", "tdm-reservation")
    started = time.process_time()
    decide(PAGE, headers={name: value for name in names})
    assert time.process_time() - started < 1


def test_rules_are_quoted_in_one_short_line():
    text = "User-agent: *\nDisallow: /" + "a\x1b\x07" * 2000 + "\n"
    rule = decide(f"{SITE}/" + "a%1B%07" * 9000, policies={ROBOTS: text}).rule
    assert rule == "" or (rule.isprintable() and len(rule) < 300)
    html = f'<head><meta name="robots" content="noai {"x " * 9000}\n\x00"></head>'
    rule = decide(PAGE, html=html).rule
    assert rule.isprintable() and len(rule) <= 200


# the cache


def test_cache_is_bounded_by_characters_and_files():
    parsed = []
    cache = ParseCache(lambda text: parsed.append(text) or len(text), characters=10, files=3)
    assert [cache(text) for text in ("aaa", "bbb", "aaa", "ccc")] == [3, 3, 3, 3]
    assert parsed == ["aaa", "bbb", "ccc"]
    cache("dddd")  # 13 characters: the least recently used goes
    cache("aaa"), cache("bbb")
    assert parsed == ["aaa", "bbb", "ccc", "dddd", "bbb"]
    assert cache("x" * 11) == 11  # longer than the cache: returned, not stored
    cache("x" * 11)
    assert parsed.count("x" * 11) == 2


def test_count_verdicts():
    decisions = [Consent("no", "noai"), Consent("no", "noai"), Consent("unknown")]
    assert count_verdicts(decisions) == {"no: noai": 2, "unknown: nothing said": 1}


def test_speed():
    """20,000 decisions a second on an idle core; half of that is a fault."""
    names = "".join(f"User-agent: bot{i}\nDisallow: /x{i}\n\n" for i in range(60))
    text = names + "User-agent: *\n" + "".join(f"Disallow: /d{i}/\n" for i in range(40))
    html = "<html><head>" + '<meta property="og:a" content="b"><link href="a.css">' * 12
    html += "</head><body>" + "text " * 3000
    headers = {name: "value" for name in "Date Server Content-Type ETag Vary Expires".split()}
    decide(PAGE, headers=headers, html=html, policies={ROBOTS: text})
    best = 0.0
    for _ in range(3):
        started = time.process_time()
        for i in range(2000):
            decide(f"{PAGE}{i}", headers=headers, html=html, policies={ROBOTS: text})
        best = max(best, 2000 / (time.process_time() - started))
    assert best > 7000
