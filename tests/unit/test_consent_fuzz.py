"""Damaged pages, headers and policy files never raise: two test vectors together, with random
edits."""

import random

from consent_vectors import SITE, VECTORS

from fastlm.data.consent import (
    MODES,
    OptOut,
    PolicyFile,
    PolicyIndex,
    allowed,
    decide,
    licence_of,
    policy_problems,
)

PIECES = [
    "<", "\x00", "\ud800", "ü", "\n", "\r", '"', "'", "&", "&#x0;", "<!--", "-->", "]]>", "[", "{",
    "<![CDATA[", "}", "]", ":", ";", ",", "=", "*", "$", "/", "%", "%zz", "#", " ", "\t", "\ufeff",
    "User-agent:", "Disallow:", "License: ", "Training:", "</head>", "<script>", "<content url='",
    "http://[", "//[::1", "\u2028", "9" * 500, "<rsl xmlns='https://rslstandard.org/rsl'>",
]  # fmt: skip
ENTRIES = (
    "domain: x.example\nurl: https://a.b/c\nrepository: a/b\nauthor: x\n# n\nhash: " + "a" * 64
)


def edited(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(0, 5)):
        i, j, kind = rng.randint(0, len(text)), rng.randint(0, len(text)), rng.random()
        if kind < 0.4:
            text = text[:i] + rng.choice(PIECES) + text[i:]
        elif kind < 0.6:
            text = text[:i] + text[i + rng.randint(0, 8) :]
        elif kind < 0.8:
            text = text[:i] + text[j : j + 20] + text[i:]
        elif text:
            text = text.replace(text[j - 1], rng.choice(PIECES), 3)
    return text


def test_nothing_raises():
    rng, verdicts = random.Random(11), set()
    for _ in range(2500):
        pair = rng.choices(VECTORS, k=2)
        policies, headers = {}, {}
        for vector in pair:
            for key, file in vector.files.items():
                text = file if isinstance(file, str) else file.text
                policies[key if "://" in key else SITE + key] = edited(text, rng)
            for key, value in (vector.headers or {}).items():
                values = value if isinstance(value, list) else [value]
                headers[key] = [edited(value, rng) for value in values]
        html = edited(pair[0].html + pair[1].html, rng)
        url = edited(SITE + pair[0].path, rng)
        decision = decide(
            url, headers=headers, html=html, policies=policies, crawler=pair[0].crawler
        )
        assert decision.rule.isprintable() and bool(decision.standard) == bool(decision.rule)
        verdicts.add((decision.verdict, decision.standard))
        policy_problems(policies)
        date = edited("2026-01-01T00:00:00Z", rng)
        index = PolicyIndex([PolicyFile(k, date, 200, text) for k, text in policies.items()])
        decide(url, date=date, html=html, policies=index, mode=rng.choice(MODES))
        licence_of(html, headers), allowed(edited("MIT OR (GPL AND CC)", rng), ["MIT"])
        lists = OptOut.of_lines(edited(ENTRIES, rng).split("\n"))
        lists.match({"url": url, "author": html[:50], "repository": url}, html)
    assert len(verdicts) > 12
