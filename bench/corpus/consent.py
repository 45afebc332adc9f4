"""Consent: test vectors, decisions a second, and the two libraries that match paths.

    python bench/corpus/consent.py [--decisions 20000]

Vectors: tests/support/consent_vectors.py, written from the texts of the standards. Decisions: pages
of php-doc (a Debian package, fetched into the cache) as if they were a site's, with a robots.txt of
100 groups and rules, for the default list of crawlers; half of a round is warm-up. Agreement:
robots.txt files with random groups and rules, by Google's parser (fast-robotstxt) on the complete
file, by protego on the complete file, and by fastlm, which finds the group itself and leaves its
paths to either. CPU seconds of one core.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from printing import print_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "tests/unit")]

SITE = "https://x.example"
HEADERS = dict.fromkeys(
    "Date Server Content-Type Content-Length Connection Cache-Control ETag Vary Age".split(),
    "value",
)
ROBOTS = (
    "".join(f"User-agent: bot{i}\nDisallow: /x{i}\n\n" for i in range(60))
    + "User-agent: *\nContent-Signal: search=yes\n"
    + "".join(f"Disallow: /dir{i}/\n" for i in range(40))
    + "\nUser-agent: GPTBot\nUser-agent: CCBot\nDisallow: /secret\n"
)
ROUNDS = 5  # the fastest counts: others use the cores


def row(bar: str, value: object, target: object, unit: str, note: str = "") -> dict:
    return {"bar": bar, "value": value, "target": target, "unit": unit, "note": note}


def vector_rows() -> list[dict]:
    """Return how many vectors of each standard are right."""
    from consent_vectors import VECTORS

    from fastlm.data.consent import STANDARDS

    result = []
    for standard in STANDARDS:
        vectors = [vector for vector in VECTORS if vector.standard == standard.name]
        wrong = [problem for vector in vectors if (problem := vector.problem())]
        note = f"{standard.version} ({standard.date}); {len(vectors)} vectors, bar 20"
        note += "".join(f"; {problem}" for problem in wrong)
        share = 0.0 if len(vectors) < 20 else 1 - len(wrong) / len(vectors)
        result.append(row(f"vectors right: {standard.name}", share, 1.0, "share", note))
    return result


def pages(count: int) -> list[tuple[str, str]]:
    """Return (address, markup) of pages of a package."""
    from fastlm.sources.packages import default_cache
    from fastlm.sources.source_files import read_source

    result = []
    for document in read_source("deb:php-doc", cache=default_cache(), on_skip=lambda _: None):
        if document.meta.get("format") == "html":
            result.append((f"{SITE}/{len(result)}.html", document.text))
        if len(result) == count:
            break
    return result


def per_second(function: Callable[[], object], count: int) -> int:
    best = 0.0
    for _ in range(ROUNDS):
        start = time.process_time()
        function()
        best = max(best, count / (time.process_time() - start))
    return round(best)


def speed_rows(count: int) -> list[dict]:
    """Return decisions a second in several situations."""
    from fastlm.data.consent import PolicyFile, decide
    from fastlm.data.consent.path_matcher import engine

    documents = pages(2000)
    rounds = max(1, count // len(documents))
    count = rounds * len(documents)
    robots = f"{SITE}/robots.txt"
    tdm = {f"{SITE}/.well-known/tdmrep.json": '[{"location": "/", "tdm-reservation": 0}]'}
    history = [PolicyFile(robots, f"2026-0{i}-01", 200, f"{ROBOTS}# {i}") for i in range(1, 6)]

    def run(policies, change=lambda html: html, headers=HEADERS, **options):
        changed = [(url, change(html)) for url, html in documents]

        def decisions():
            for _ in range(rounds):
                for url, html in changed:
                    decide(url, headers=headers, html=html, policies=policies, **options)

        return per_second(decisions, count)

    def mark(html):
        return html.replace("<head>", '<head><meta name="robots" content="noai">', 1)

    size = sum(len(html) for _, html in documents) / len(documents)
    note = f"{len(documents):,} pages of {size:,.0f} characters, 12 crawlers, {engine()}"
    plain = {robots: ROBOTS}
    return [
        row("decisions", run(plain), 20_000, "pages/s", note),
        row("decisions, one crawler", run(plain, crawler="CCBot"), None, "pages/s"),
        row("decisions, with tdmrep.json", run(plain | tdm), None, "pages/s"),
        row(
            "decisions, 5 dated files", run(history, date="2026-03-05"), None, "pages/s",
            "as-crawled",
        ),
        row(
            "decisions, noai in every page", run(plain, mark), None, "pages/s",
            "the head of each page is parsed",
        ),
    ]  # fmt: skip


def agreement_rows(files: int = 4000, seed: int = 5) -> list[dict]:
    """Return how many decisions differ from Google's parser on the complete file."""
    from protego import Protego
    from robotstxt import RobotsMatcher
    from test_consent_robots import PATHS, generate

    from fastlm.data.consent.path_matcher import ProtegoMatcher, normal_path, normal_pattern
    from fastlm.data.consent.robots import RobotsFile

    matcher, rng = RobotsMatcher(), random.Random(seed)
    names = ["GPTBot", "CCBot", "Googlebot", "SomeBot"]
    total = with_google = with_protego = protego = 0
    for _ in range(files):
        text = generate(rng)
        file, parser = RobotsFile(text), Protego.parse(text)
        for _ in range(5):
            path, crawler = rng.choice(PATHS), rng.choice(names)
            expected = matcher.is_allowed(text, crawler, SITE + path)
            (_, group), *_ = file.groups((crawler,))
            rules = [(line.key == "allow", normal_pattern(line.value)) for line in group.paths]
            spelled = normal_path(path)
            total += 1
            with_google += (group.disallows(spelled) is None) != expected
            with_protego += (ProtegoMatcher(rules).match(spelled) is None) != expected
            protego += parser.can_fetch(SITE + path, crawler) != expected
    note = f"of {total:,} generated decisions, against Google's parser on the complete file"
    return [
        row(
            "paths: fastlm with fast-robotstxt differs", with_google, None, "decisions",
            f"{note}: /%62 is longer than /b there, equal in RFC 9309",
        ),
        row("paths: fastlm with protego differs", with_protego, None, "decisions", note),
        row("paths: protego alone differs", protego, None, "decisions", note),
    ]  # fmt: skip


def opt_out_rows(count: int = 1_000_000) -> list[dict]:
    """Return the speed of a long opt-out list."""
    from fastlm.data.consent import OptOut

    lines = [f"d{i}.example" for i in range(count // 2)]
    lines += [f"https://s{i}.example/path{i}/" for i in range(count // 2)]
    start = time.process_time()
    entries = OptOut.of_lines(lines)
    load = time.process_time() - start
    document = {"url": "https://www.site.example/a/long/path/to/a/page.html?x=1"}
    speed = per_second(lambda: [entries.match(document) for _ in range(20_000)], 20_000)
    note = f"{len(entries):,} domains and addresses, read in {load:.1f} s"
    return [row("opt-out list", speed, None, "pages/s", note)]


def rows(decisions: int = 20_000) -> list[dict]:
    """Measure; return {bar, value, target, unit, note} of each bar. Some 30 s."""
    return [*vector_rows(), *speed_rows(decisions), *agreement_rows(), *opt_out_rows()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--decisions", type=int, default=20_000)
    print_rows(
        rows(parser.parse_args().decisions), ("fast-robotstxt", "protego", "http-sf", "resiliparse")
    )


if __name__ == "__main__":
    main()
