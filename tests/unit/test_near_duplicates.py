"""Near duplicates against a brute-force join, on sections of the docs with planted edits."""

import re
from typing import Any, cast

import numpy as np
import pytest
from edited_pages import edited_pages
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm.data.near_duplicates as near_duplicates
from fastlm.data.near_duplicates import (
    DocumentGroups,
    Duplicate,
    band_keys,
    bands,
    candidate_groups,
    components,
    find,
    resolve,
)
from fastlm.data.shingles import NGRAM, jaccard, shingles
from fastlm.errors import InputError


def ngrams(text: str) -> set[tuple[str, ...]]:
    """Return the word 5-grams of a text in a script with spaces, by definition."""
    words = re.findall(r"\w+", text.casefold())
    last = max(len(words) - NGRAM + 1, 1) if words else 0
    return {tuple(words[i : i + NGRAM]) for i in range(last)}


def exact(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def greedy(sets: list[set], threshold: float, earlier: int = 0) -> dict[int, tuple[int, float]]:
    """Return {removed: (document that stands for it, similarity)} of an exact join."""
    order = sorted(range(len(sets)), key=lambda i: (i >= earlier, -len(sets[i]), i))
    remaining, removed = [], {}
    for i in order:
        similar = [(exact(sets[i], sets[j]), -rank) for rank, j in enumerate(remaining)]
        best, rank = max(similar, default=(0.0, 0))
        if best >= threshold and i >= earlier:
            removed[i] = (remaining[-rank], best)
        else:
            remaining.append(i)
    return removed


@pytest.fixture(scope="module")
def pages() -> list[str]:
    return edited_pages(300)


def test_shingles_are_the_word_5_grams(pages):
    for text in [*pages[:50], "one two", "one two three four five", "Ünïcode ÉTÉ ßtraße d'été 1_2"]:
        assert len(shingles(text)) == len(ngrams(text))
    a, b = pages[:2]
    assert jaccard(shingles(a), shingles(b)) == exact(ngrams(a), ngrams(b))


def test_shingles_are_the_same_everywhere():
    """Signatures on disk are compared with those of another machine."""
    hashes = [8081937478870019445, 10028419326260035222]
    assert shingles("the quick brown fox jumps over").tolist() == hashes


def test_shingles_ignore_case_and_what_is_between_words():
    text = "The quick, brown fox -- jumps over the lazy dog."
    assert (shingles(text) == shingles("the QUICK brown\nfox jumps (over) the lazy dog")).all()
    assert not np.isin(
        shingles(text), shingles("dog lazy the over jumps fox brown quick the")
    ).any()


def test_a_short_text_is_one_shingle_and_a_text_without_words_has_none():
    assert len(shingles("one two three four")) == len(shingles("one")) == 1
    assert shingles("one two").tolist() != shingles("two one").tolist()
    assert len(shingles("")) == len(shingles(" -- !\n")) == 0


def test_words_are_the_same_at_the_ends_of_pieces(monkeypatch):
    text = " ".join(f"word{i}" for i in range(30_000))  # more than one piece of 65,536 characters
    middle = " ".join(f"word{i}" for i in range(5_000, 25_000))
    assert len(shingles(text)) == 30_000 - NGRAM + 1
    assert np.isin(shingles(middle), shingles(text)).all()
    assert np.isin(shingles(middle + " é"), shingles(text)).mean() > 0.999
    assert len(shingles("x" * 200_000)) == 1


SENTENCES = {
    "Chinese": (
        "机器学习模型需要大量高质量的训练数据才能获得良好的结果",
        "今天的天气非常好我们决定一起去公园散步并且吃午饭",
    ),
    "Japanese": (
        "機械学習のモデルは大量の高品質な訓練データを必要とします",
        "今日は天気がとても良いので公園へ散歩に行くことにしました",
    ),
    "Thai": (
        "แบบจำลองการเรียนรู้ของเครื่องต้องการข้อมูลจำนวนมาก",
        "วันนี้อากาศดีมากเราจึงตัดสินใจไปเดินเล่นในสวนด้วยกัน",
    ),
}


@pytest.mark.parametrize(("text", "other"), SENTENCES.values(), ids=SENTENCES)
def test_scripts_without_spaces_are_compared_by_characters(text, other):
    windows = {text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)}
    assert len(shingles(text)) == len(windows)
    edited = text + other[:3]
    assert 0.8 <= jaccard(shingles(text), shingles(edited)) < 1
    assert jaccard(shingles(text), shingles(other)) < 0.1
    assert find([text, other, edited]) == [
        Duplicate(0, 2, jaccard(shingles(text), shingles(edited)))
    ]


def test_korean_has_words():
    assert len(shingles("기계 학습 모델은 많은 데이터를 필요로 합니다")) == 3


def test_find_equals_the_exact_join(pages):
    """The recall of 20 bands of 6 rows at 0.8 is 0.997, and higher above it."""
    expected = greedy([ngrams(page) for page in pages], 0.8)
    duplicates = find(pages)
    assert len(expected) > 50
    for removed, remaining, similarity in duplicates:
        assert similarity == exact(ngrams(pages[removed]), ngrams(pages[remaining])) >= 0.8
    matches = {d.removed: d[1:] for d in duplicates}.items() & expected.items()
    assert len(matches) >= 0.97 * len(expected)
    assert len(duplicates) <= len(expected) + 0.03 * len(expected)
    assert not {d.removed for d in duplicates} & {d.kept for d in duplicates}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("small", [0, 10**6], ids=["index", "all pairs"])
@pytest.mark.parametrize("earlier", [0, 60])
def test_resolve_equals_the_exact_join(pages, threshold, small, earlier, monkeypatch):
    monkeypatch.setattr(near_duplicates, "SMALL", small)
    pages = pages[:200]
    arrays = [shingles(page) for page in pages]
    order = np.random.default_rng(1).permutation(len(pages))
    lengths = np.array([len(array) for array in arrays])
    resolution = resolve(
        order, lengths[order], arrays.__getitem__, threshold, earlier=earlier
    )  # fmt: skip
    sets = [set(array.tolist()) for array in arrays]
    expected = greedy(sets, threshold, earlier)
    assert {d.removed: d[1:] for d in resolution.duplicates} == expected
    assert resolution.limited == 0
    clusters = dict(zip(order.tolist(), resolution.clusters.tolist()))
    sizes = dict(zip(order.tolist(), resolution.sizes.tolist()))
    for removed, (remaining, _) in expected.items():
        assert clusters[removed] == clusters[remaining] <= min(removed, remaining)
    for document, cluster in clusters.items():
        members = [d for d, c in clusters.items() if c == cluster]
        assert cluster == min(members)
        assert sizes[document] == len(members)
    assert len(set(clusters.values())) > 10


def test_what_remains_has_no_near_duplicate(pages):
    removed = {d.removed for d in find(pages)}
    remaining = [page for i, page in enumerate(pages) if i not in removed]
    assert len(find(remaining)) <= 0.01 * len(pages)


WORDS = st.lists(st.sampled_from("a b c d e f g".split()), max_size=12).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS, max_size=12), st.sampled_from([0.5, 0.8, 1.0]), st.randoms())
def test_the_order_of_texts_changes_only_ties(texts, threshold, rng):
    duplicates = find(texts, threshold)
    sets = [ngrams(text) for text in texts]
    for removed, remaining, similarity in duplicates:
        assert similarity == exact(sets[removed], sets[remaining]) >= threshold
        assert (-len(sets[remaining]), remaining) < (-len(sets[removed]), removed)
    assert not {d.removed for d in duplicates} & {d.kept for d in duplicates}
    assert duplicates == find(list(texts), threshold)
    # equal sizes in another order are other documents to keep: unequal ones are not
    if len({len(s) for s in sets}) == len(sets):
        shuffled = rng.sample(range(len(texts)), len(texts))
        again = find([texts[i] for i in shuffled], threshold)
        assert {(shuffled[a], shuffled[b]) for a, b, _ in again} == {d[:2] for d in duplicates}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), max_size=40), st.randoms())
def test_groups_and_components_of_any_records(records, rng):
    """Against a definition, in any order of the records and cut into any partitions."""
    shuffled = rng.sample(records, len(records))
    partitions = [[r for r in shuffled if r[0] % 3 == p] for p in range(3)]
    groups = [
        candidate_groups(
            np.array([k for k, _ in part], np.uint64), np.array([d for _, d in part], np.int64)
        )
        for part in rng.sample(partitions, 3)
    ]
    by_key = {k: sorted({d for key, d in records if key == k}) for k, _ in records if k}
    sets = [members.tolist() for part in groups for members in part]
    assert sorted(sets) == sorted(members for members in by_key.values() if len(members) > 1)
    label = {d: d for members in sets for d in members}
    for _ in label:
        for members in sets:
            smallest = min(label[d] for d in members)
            label.update(dict.fromkeys(members, smallest))
    expected = [
        [d for d in sorted(label) if label[d] == root] for root in sorted({*label.values()})
    ]
    assert [members.tolist() for members in components(groups)] == expected


def test_one_key_of_many_documents_is_one_group():
    groups = candidate_groups(np.full(200_000, 5, np.uint64), np.arange(200_000)[::-1])
    assert isinstance(groups, DocumentGroups)
    assert len(groups) == 1
    assert len(components([groups])) == 1


@pytest.mark.parametrize("unique", [0.005, 0.11, 0.16, 0.3])
def test_a_templated_site_takes_a_bounded_number_of_comparisons(unique, monkeypatch):
    """All pages have the template; a page is a near copy of another up to 11 % of its own text."""
    comparisons = 0

    def count(a, b):
        nonlocal comparisons
        comparisons += 1
        return jaccard(a, b)

    rng = np.random.default_rng(2)
    template = rng.integers(0, 2**64, 200, np.uint64)
    shares = np.clip(rng.normal(unique, 0.01, 200), 0, 0.5)
    pages = [
        np.unique(np.append(template, rng.integers(0, 2**64, int(200 * s / (1 - s)), np.uint64)))
        for s in shares
    ]
    lengths = np.array([len(page) for page in pages])
    monkeypatch.setattr(near_duplicates, "jaccard", count)
    resolution = resolve(np.arange(200), lengths, pages.__getitem__)
    assert comparisons <= near_duplicates.MAX_COMPARISONS * 200
    if unique in (0.16, 0.3):  # the prefix filter leaves almost nothing to compare
        assert comparisons < 200
    sets = [set(page.tolist()) for page in pages]
    expected = greedy(sets, 0.8)
    assert len(resolution.duplicates) >= 0.99 * len(expected)
    assert (len(expected) > 150) == (unique == 0.005)


def test_texts_without_words_are_no_duplicates():
    texts = ["", "", "--", "--", "one", "one", "a whole sentence of seven words here"]
    assert find(texts) == [Duplicate(5, 4, 1.0)]
    assert find([]) == []
    assert find([""] * 3) == []


def test_of_equal_texts_the_first_remains():
    text = "a sentence that is long enough to have some shingles"
    assert find(["other " + text[:20], text, text, text.upper()]) == [
        Duplicate(2, 1, 1.0), Duplicate(3, 1, 1.0),
    ]  # fmt: skip


def test_texts_of_an_earlier_build_remain():
    """An earlier text wins over a longer new one, and over earlier copies of itself."""
    short = "the text of an earlier build with all of these twenty words in it "
    long = short + "and more"
    unrelated = "something that has nothing to do with the others at all, and is new"
    assert jaccard(shingles(short), shingles(long)) < 0.85
    assert find([short, short, long, unrelated], earlier=2) == [
        Duplicate(2, 0, jaccard(shingles(short), shingles(long)))
    ]
    assert find([short, short, long, unrelated]) == [
        Duplicate(0, 2, jaccard(shingles(short), shingles(long))),
        Duplicate(1, 2, jaccard(shingles(short), shingles(long))),
    ]


@pytest.mark.parametrize("threshold", [0, 0.05, 1.1, -1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(InputError, match=r"threshold: expected 0\.1 to 1"):
        find(["a"], threshold)


@pytest.mark.parametrize("earlier", [-1, 2])
def test_a_wrong_number_of_earlier_texts_is_refused(earlier):
    with pytest.raises(InputError, match=f"earlier: expected 0 to 1.*{earlier}"):
        find(["a"], earlier=earlier)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_find_pairs_at_the_threshold(threshold):
    count, rows = bands(threshold)
    assert 1 - (1 - threshold**rows) ** count >= near_duplicates.RECALL
    assert count * rows <= near_duplicates.MAX_HASHES
    assert threshold != 0.8 or (count, rows) == (20, 6)


def test_keys_find_pairs_as_often_as_computed():
    """200 pairs of similarity 0.6: 1 - (1 - 0.6^6)^20 = 0.62 of them share a key."""
    rng = np.random.default_rng(3)
    pairs = [rng.integers(0, 2**64, (5, 100), np.uint64) for _ in range(200)]
    a = band_keys([np.sort(p[:4].ravel()) for p in pairs])
    b = band_keys([np.sort(p[1:].ravel()) for p in pairs])
    assert a.shape == (200, 20)
    assert a.dtype == np.uint64
    shared = (a == b).any(axis=1).mean()
    assert 0.5 < shared < 0.74  # 0.62 +- 3.5 standard errors


def test_keys_depend_on_the_set_alone(pages):
    arrays = [shingles(page) for page in [*pages[:20], ""]]
    keys = band_keys(arrays)
    assert (keys == np.concatenate([band_keys([array]) for array in arrays])).all()
    assert (keys[-1] == near_duplicates.NO_KEY).all()
    assert len(np.unique(keys[:-1])) > 19 * 15
    assert band_keys([]).shape == (0, 20)


def test_texts_are_a_list_of_texts():
    cases = ((iter("ab"), "texts: .* got str_"), (["a", None], r"texts\[1\]: .* got NoneType"))
    for texts, got in cases:
        with pytest.raises(InputError, match=got):
            find(cast(Any, texts))
