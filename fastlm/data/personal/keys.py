"""Find private keys (PEM), API keys of known services and JSON web tokens.

A key begins with the prefix that its service documents, has the length that the service uses and
mixes letters with digits, as random text does. Most texts hold no prefix, so a substring test per
prefix decides before any pattern runs: 95 MB/s for all of them. One pattern of all keys runs at 21,
one of all prefixes at 51 MB/s, since their first letters are those of ordinary words.

Rejected: any random-looking string (entropy alone). Hashes, ids and base64 data look the same, and
documentation is full of them.
"""

import re
from collections.abc import Iterator

from fastlm.data.personal.spans import Span

WORD = r"[A-Za-z0-9]"
URL_SAFE = r"[A-Za-z0-9_-]"
# prefix: pattern that begins with it
KEYS = {
    **{prefix: rf"{prefix}[A-Z2-7]{{16}}" for prefix in ("AKIA", "ASIA")},  # AWS
    **{f"{p}_": rf"{p}_{WORD}{{36,251}}" for p in ("ghp", "gho", "ghu", "ghs", "ghr")},  # GitHub
    "github_pat_": r"github_pat_\w{40,255}",
    "glpat-": rf"glpat-{URL_SAFE}{{20,64}}",  # GitLab
    "xox": r"xox[abeoprs](?:\.xox[bp])?-[A-Za-z0-9-]{20,255}",  # Slack
    "xapp-": r"xapp-[A-Za-z0-9-]{20,255}",
    "hooks.slack.com/services/": r"hooks\.slack\.com/services/T\w{6,14}/B\w{6,14}/\w{16,40}",
    "k_live_": rf"[rsp]k_live_{WORD}{{16,247}}",  # Stripe
    "k_test_": rf"[rsp]k_test_{WORD}{{16,247}}",
    "whsec_": r"whsec_[A-Za-z0-9+/]{32,64}",
    "AIza": rf"AIza{URL_SAFE}{{35}}",  # Google
    "GOCSPX-": rf"GOCSPX-{URL_SAFE}{{28}}",
    "ya29.": rf"ya29\.{URL_SAFE}{{30,512}}",
    "sk-": rf"sk-(?:[a-z]{{2,8}}\d?\d?-){{0,2}}{URL_SAFE}{{20,255}}",  # OpenAI, Anthropic, others
    "hf_": r"hf_[A-Za-z0-9]{30,40}",  # Hugging Face
    "npm_": rf"npm_{WORD}{{36}}",
    "pypi-AgE": rf"pypi-AgE{URL_SAFE}{{50,512}}",
    "SG.": rf"SG\.{URL_SAFE}{{22}}\.{URL_SAFE}{{43}}",  # SendGrid
    "dop_v1_": r"dop_v1_[0-9a-f]{64}",  # DigitalOcean
    "shp": r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",  # Shopify
    "dapi": r"dapi[0-9a-f]{32}",  # Databricks
    "eyJ": rf"eyJ{URL_SAFE}{{10,4096}}\.eyJ{URL_SAFE}{{10,8192}}\.{URL_SAFE}{{16,2048}}",  # JWT
}
# AWS's documentation ends its examples so; "x" and "." stand for a secret in examples
EXAMPLE = re.compile(r"example|x{6}|\.\.\.|0{8}|123456789|abcdefgh", re.IGNORECASE)
PATTERNS = {
    prefix: re.compile(rf"(?<![A-Za-z0-9_])(?:{pattern})(?![A-Za-z0-9_])")
    for prefix, pattern in KEYS.items()
}
PEM = re.compile(r"-----(BEGIN|END) (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
# of a key that is cut: lines of base64 up to the first other line
PEM_LINES = re.compile(r"(?:\s{1,4}[A-Za-z0-9+/=]{16,128}(?=\s|$))+")


def find_keys(text: str) -> Iterator[Span]:
    """Yield the private keys and API keys of a text."""
    if "-----BEGIN " in text:
        yield from _find_private_keys(text)
    for prefix, pattern in PATTERNS.items():
        if prefix in text:
            for m in pattern.finditer(text):
                if _is_random(m[0][len(prefix) :]) and not EXAMPLE.search(m[0]):
                    yield Span(m.start(), m.end(), "key", m[0])


def _is_random(secret: str) -> bool:
    """Return True for letters mixed with digits and few repeats, False for words and hyphens."""
    digits = sum(c.isdigit() for c in secret)
    letters = sum(c.isalpha() for c in secret)
    return digits >= 2 and letters >= 2 and len(set(secret)) >= min(8, len(secret) // 2)


def _find_private_keys(text: str) -> Iterator[Span]:
    """Yield blocks from BEGIN to END. One pass over the marks keeps a text of BEGINs linear."""
    begin: re.Match[str] | None = None
    for mark in PEM.finditer(text):
        if begin is not None and mark[1] == "END":
            yield from _private_key(text, begin, mark.start(), mark.end())
            begin = None
        elif mark[1] == "BEGIN":
            if begin is not None:
                yield from _cut_key(text, begin)
            begin = mark
    if begin is not None:
        yield from _cut_key(text, begin)


def _private_key(text: str, begin: re.Match[str], end: int, after: int) -> Iterator[Span]:
    body = "".join(text[begin.end() : end].split())
    # an elliptic key has 120 characters; "..." and "MIIE..." in documentation are none
    if len(body) >= 64 and "..." not in body:
        yield Span(begin.start(), after, "key", body)


def _cut_key(text: str, begin: re.Match[str]) -> Iterator[Span]:
    lines = PEM_LINES.match(text, begin.end())
    if lines is not None:
        yield from _private_key(text, begin, lines.end(), lines.end())
