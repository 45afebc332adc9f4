"""At least 20 cases for each consent standard, written from its text, with both libraries."""

from collections import Counter

import pytest
from consent_vectors import VECTORS

from fastlm.data.consent import STANDARDS, path_matcher
from fastlm.data.consent.policy_files import CACHES


@pytest.fixture(params=["fast-robotstxt", "protego"])
def library(request, monkeypatch):
    """The library that matches paths; parsed files hold its objects."""
    pytest.importorskip(path_matcher.ENGINES[request.param][0])
    monkeypatch.setattr(path_matcher, "engine", lambda: request.param)
    for cache in CACHES.values():
        cache.clear()
    yield request.param
    for cache in CACHES.values():
        cache.clear()


def test_each_standard_has_twenty_vectors_of_its_own():
    counts = Counter(vector.standard for vector in VECTORS)
    assert {standard.name for standard in STANDARDS} == counts.keys()
    assert min(counts.values()) >= 20
    assert len({str(vector) for vector in VECTORS}) == len(VECTORS)


def test_vectors(library):
    problems = [problem for vector in VECTORS if (problem := vector.problem())]
    assert problems == []


def test_standards_are_dated():
    for standard in STANDARDS:
        assert standard.version and standard.url.startswith("https://")
        assert "2022-01-01" < standard.date < "2027"
