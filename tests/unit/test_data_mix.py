"""Weights of documents: tables, refusals, and the number of copies."""

import math
import random

import pytest

from fastlm.data.mix import (
    BUCKETS,
    Mix,
    MixWeights,
    check_mix,
    check_names,
    complete,
    copies,
    mix_keys,
)
from fastlm.errors import InputError
from fastlm.schema import validate


def keys_of(count: int) -> list[int]:
    draw = random.Random(0)
    return [draw.getrandbits(64) for _ in range(count)]


@pytest.mark.parametrize("weight", [0, 0.05, 0.5, 1, 1.95, 2.3, 7])
def test_the_mean_number_of_copies_is_the_weight(weight):
    counts = [copies(weight, key) for key in keys_of(20_000)]
    assert {*counts} <= {math.floor(weight), math.ceil(weight)}
    assert sum(counts) / len(counts) == pytest.approx(weight, abs=0.015)


@pytest.mark.parametrize("keys", [range(2000), range(0, 2**62, 2**51), range(2**64 - 2000, 2**64)])
def test_copies_do_not_depend_on_the_size_of_the_keys(keys):
    """Held-out documents have small keys."""
    assert sum(copies(0.5, key) for key in keys) / len(keys) == pytest.approx(0.5, abs=0.05)


def test_a_larger_weight_keeps_what_a_smaller_one_kept():
    for key in keys_of(500):
        counts = [copies(weight / 10, key) for weight in range(31)]
        assert counts == sorted(counts) and counts[::10] == [0, 1, 2, 3]


def test_weights_multiply_up_to_the_cap():
    mix = {"sources": {"a": 2, "*": 0.5}, "languages": {"de": 3}, "max_epochs": 4}
    weights = MixWeights(complete(mix, None))
    assert weights.weight({"sources": "a", "languages": "de", "buckets": "19"}) == 4
    assert weights.weight({"sources": "a", "languages": "en"}) == 2
    assert weights.weight({"sources": "b", "languages": "de"}) == 1.5
    assert weights.weight({"sources": "b"}) == 0.5
    buckets = [float(bucket == 7) for bucket in range(BUCKETS)]
    weights = MixWeights(complete({"buckets": buckets}, None))
    assert [weights.weight({"buckets": str(b)}) for b in (6, 7)] == [0, 1]
    assert weights.drop_reason({"sources": "a", "buckets": "6"}) == "bucket 6 has weight 0"
    assert weights.drop_reason({"sources": "a", "buckets": "7"}) == "not drawn by its weight"


def test_keys_are_those_that_a_document_has():
    assert mix_keys("docs", {}) == {"sources": "docs"}
    assert mix_keys("docs", {"language": "de", "quality_bucket": 3, "url": "x"}) == {
        "sources": "docs", "languages": "de", "buckets": "3"
    }  # fmt: skip


@pytest.mark.parametrize(("mix", "message"), [
    ({"sources": {"a": -1}}, r"mix.sources.a: expected a weight from 0 to 100, got -1"),
    ({"sources": {"a": math.nan}}, r"mix.sources.a: expected a weight"),
    ({"languages": {"de": math.inf}}, r"mix.languages.de: expected a weight"),
    ({"languages": {"de": 101}}, r"mix.languages.de: expected a weight"),
    ({"buckets": [1.0] * 19}, r"mix.buckets: expected 20 weights, got 19"),
    ({"buckets": [1.0] * 19 + [-1]}, r"mix.buckets.19: expected a weight"),
    ({"buckets": "worst"}, r"mix.buckets: expected weights, model or equal, got 'worst'"),
    ({"max_epochs": 0}, r"mix.max_epochs: expected more than 0"),
    ({"max_epochs": math.nan}, r"mix.max_epochs: expected more than 0"),
    ({"source": {"a": 1}}, r"mix.source: unknown key; .* 'sources'"),
])  # fmt: skip
def test_bad_values_are_refused(mix, message):
    with pytest.raises(InputError, match=message):
        check_mix(mix, has_languages=True, has_quality=True)


def test_weights_without_what_they_weigh_are_refused():
    with pytest.raises(InputError, match=r"mix.languages: expected a language_method"):
        check_mix({"languages": {"de": 2}}, has_languages=False, has_quality=True)
    for buckets in ("model", [1.0] * BUCKETS):
        with pytest.raises(InputError, match=r"mix.buckets: expected a quality model"):
            check_mix({"buckets": buckets}, has_languages=True, has_quality=False)
    check_mix({"buckets": "equal"}, has_languages=False, has_quality=False)


def test_unknown_names_are_refused_and_the_known_ones_named():
    with pytest.raises(InputError, match=r"mix.sources: expected a, b or \*, got 'c'"):
        check_names({"sources": {"c": 1}}, ["a", "b"], [])
    with pytest.raises(InputError, match=r"mix.languages: expected ISO 639 codes.* got 'german'"):
        check_names({"languages": {"german": 1}}, ["a"], ["de", "en"])
    check_names({"sources": {"*": 2, "a": 1}, "languages": {"*": 0}}, ["a"], ["de"])


def test_a_recipe_checks_the_types():
    assert validate({"sources": {"a": 2}}, Mix, "mix.", extra="forbid") == {"sources": {"a": 2}}
    for bad in ({"sources": {"a": "much"}}, {"sources": [1]}, {"max_epochs": "4"}, {"other": 1}):
        with pytest.raises(InputError, match=r"mix\."):
            validate(bad, Mix, "mix.", extra="forbid")
