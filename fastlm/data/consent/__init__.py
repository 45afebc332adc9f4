"""Decide whether a model may be trained on a page: `decide`.

It reads what sites write for programs: robots.txt, AIPREF (``Content-Usage``), Content Signals,
TDMRep, RSL, ``noai`` and ai.txt. Each standard has a file with its version and date, since most are
drafts, and its own precedence; across standards the most restrictive statement wins. The answer
names the rule and the line that decided.

    consent = decide(
        "https://x.example/a",
        date="2026-11-30T10:00:00Z",
        headers={"X-Robots-Tag": "noai"},
        html=page,
        policies={"https://x.example/robots.txt": text},
        crawler="CCBot",
    )
    consent.verdict, consent.rule, consent.source   # "no", "noai", "header X-Robots-Tag"

`opt_out` has lists of who asked to be left out, `licence` the licence that a page states.

**This is no legal advice.** "yes" means that a machine-readable statement permits training, not
that the law does; "unknown" means that none was found. Terms of use in prose, contracts and the
law of a country are not read.
"""

from fastlm.data.consent.crawlers import all_crawlers, default_crawlers
from fastlm.data.consent.decision import STANDARDS, count_verdicts, decide, statements
from fastlm.data.consent.licence import allowed, licence_of
from fastlm.data.consent.opt_out import OptOut
from fastlm.data.consent.policy_files import (
    MODES,
    PolicyFile,
    policies_at,
    policy_problems,
)
from fastlm.data.consent.policy_index import PolicyIndex, write_policies
from fastlm.data.consent.statement import Consent

__all__ = [
    "MODES",
    "STANDARDS",
    "Consent",
    "OptOut",
    "PolicyFile",
    "PolicyIndex",
    "all_crawlers",
    "allowed",
    "count_verdicts",
    "decide",
    "default_crawlers",
    "licence_of",
    "policies_at",
    "policy_problems",
    "statements",
    "write_policies",
]
