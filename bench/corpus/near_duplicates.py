"""Near duplicates: recall and wrong removals against an exact join, and speed.

    python bench/corpus/near_duplicates.py [--documents 20000]

Documents: the pages of php-doc, libreoffice-help-en-us and python3.13-doc (Debian packages, fetched
into the cache), extracted by fastlm and filtered by its technical rules, without equal texts, and
edited copies of them (words replaced, inserted and deleted, paragraphs moved or dropped) up to
20,000. The exact join is a program of its own, on tuples of words. datatrove's default (14 bands of
8 rows, connected components, no comparison) runs on the same shingles. CPU seconds of one core.
"""

import argparse
import math
import random
import re
import time
from collections import Counter, defaultdict

import numpy as np
from printing import print_rows

SOURCES = ("deb:php-doc", "deb:libreoffice-help-en-us", "deb:python3.13-doc")
THRESHOLD = 0.8
WORDS = re.compile(r"\w+")


def pages(limit: int | None = None) -> list[str]:
    """Return the clean pages of the packages, without equal texts."""
    from fastlm.data.dedup import content_key
    from fastlm.data.extract import extract
    from fastlm.data.filter import TECHNICAL, first_failed
    from fastlm.sources.packages import default_cache
    from fastlm.sources.source_files import read_source

    texts = {}
    for source in SOURCES:
        for document in read_source(source, cache=default_cache(), on_skip=lambda message: None):
            if document.meta.get("format") == "html":
                text = extract(document)
                if text.strip() and first_failed(text, TECHNICAL) is None:
                    texts.setdefault(content_key(text), text)
            if len(texts) == limit:
                return [*texts.values()]
    return [*texts.values()]


def edited(text: str, rng: random.Random) -> str:
    """Return a copy with edits that leave a similarity of about 0.5 to 1."""
    paragraphs = text.split("\n\n")
    kind = rng.randrange(4)
    if kind == 0 and len(paragraphs) > 3:
        del paragraphs[rng.randrange(len(paragraphs))]
    elif kind == 1:
        paragraphs.insert(0, "Copied from another site, last changed today. " * rng.randrange(1, 4))
    elif kind == 2:
        rng.shuffle(paragraphs)
    share = rng.choice([0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05])
    words = re.split(r"(\s+)", "\n\n".join(paragraphs))
    for index in range(0, len(words), 2):
        if rng.random() < share:
            words[index] = rng.choice(["", "edit", words[index] + " insertion"])
    return "".join(words)


def documents(count: int) -> list[str]:
    """Return the pages and edited copies of them, shuffled."""
    rng = random.Random(1)
    originals = pages(count)
    copies = [edited(rng.choice(originals), rng) for _ in range(count - len(originals))]
    texts = [*originals, *copies]
    rng.shuffle(texts)
    return texts


def word_sets(texts: list[str]) -> list[set[int]]:
    """Return the word 5-grams of each text as numbers of tuples of words."""
    numbers: dict[tuple[str, ...], int] = {}
    sets = []
    for text in texts:
        words = WORDS.findall(text.casefold())
        grams = {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, min(len(words), 1)))}
        sets.append({numbers.setdefault(gram, len(numbers)) for gram in grams})
    return sets


def similarity(a: set[int], b: set[int]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def exact_join(sets: list[set[int]]) -> dict[tuple[int, int], float]:
    """Return all pairs at the threshold (prefix filter of Chaudhuri et al. 2006)."""
    frequency = Counter(item for items in sets for item in items)
    postings, pairs = defaultdict(list), {}
    for i in sorted(range(len(sets)), key=lambda i: (len(sets[i]), i)):
        items, candidates = sets[i], set()
        prefix = len(items) - math.ceil(THRESHOLD * len(items) - 1e-9) + 1
        for item in sorted(items, key=lambda x: (frequency[x], x))[:prefix]:
            candidates |= {j for j in postings[item] if len(sets[j]) >= THRESHOLD * len(items)}
            postings[item].append(i)
        for j in candidates:
            if (value := similarity(items, sets[j])) >= THRESHOLD:
                pairs[min(i, j), max(i, j)] = value
    return pairs


def exact_removals(sets: list[set[int]], pairs: dict[tuple[int, int], float]) -> set[int]:
    """Return what a removal with all pairs removes: the longest document remains."""
    neighbours = defaultdict(set)
    for i, j in pairs:
        neighbours[i].add(j)
        neighbours[j].add(i)
    remaining: set[int] = set()
    order = sorted(range(len(sets)), key=lambda i: (-len(sets[i]), i))
    for i in order:
        if not neighbours[i] & remaining:
            remaining.add(i)
    return set(order) - remaining


def connected(arrays: list[np.ndarray], count: int, rows_of_band: int) -> list[tuple[int, int]]:
    """Return (removed, document that stays) of plain MinHash with connected components, in which
    the first document stays."""
    from fastlm.data import near_duplicates as near

    keys = near._batch_keys(arrays, near.Bands(count, rows_of_band))
    groups = near.candidate_groups(keys.ravel(), np.repeat(np.arange(len(arrays)), count))
    return [(int(i), int(m[0])) for m in near.components([groups]) for i in m[1:]]


def speeds(texts: list[str]) -> list[dict]:
    """Time signing (with shingling) by fastlm and by other libraries."""
    from fastlm.data.near_duplicates import band_keys, find
    from fastlm.data.shingles import shingles

    def grams(texts):
        for text in texts:
            words = WORDS.findall(text.casefold())
            yield list({" ".join(words[i : i + 5]) for i in range(max(len(words) - 4, 1))})

    def signing_and_checking():
        find(texts, THRESHOLD)

    def signing():
        band_keys(map(shingles, texts))

    def rensa():
        from rensa import RMinHash

        RMinHash.digest_matrix_from_token_sets([*grams(texts)], 120, 1)

    def datasketch():
        from datasketch import MinHash

        sample = texts[: len(texts) // 5]
        MinHash.bulk([[x.encode() for x in items] for items in grams(sample)], num_perm=120)
        return len(sample)

    def datatrove():
        import tempfile

        from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

        sample = texts[: len(texts) // 20]
        config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
        with tempfile.TemporaryDirectory() as folder:
            step = MinhashDedupSignature(output_folder=folder, config=config)
            for text in sample:
                items = step.get_shingles(text)
                if items.size:
                    step.get_signature(items)
        return len(sample)

    ways = {
        "signing and checking": (signing_and_checking, 5000, "find"),
        "signing": (signing, 5000, "shingles, band_keys"),
        "signing, rensa with strings": (rensa, None, "Python's sets of strings, 120 values"),
        "signing, datasketch": (datasketch, None, "120 values, a fifth of the documents"),
        "signing, datatrove": (datatrove, None, "14 x 8, spaCy words, a twentieth"),
    }
    rows = []
    for bar, (run, target, note) in ways.items():
        best = math.inf
        try:
            for _ in range(3 if target else 1):
                start = time.process_time()
                count = run() or len(texts)
                best = min(best, (time.process_time() - start) / count)
        except ImportError as error:
            rows.append(row(bar, None, target, "documents/s", f"not installed: {error.name}"))
            continue
        rows.append(row(bar, round(1 / best), target, "documents/s", note))
    return rows


def templated_site(count: int) -> float:
    """Return the CPU seconds of a component of pages with one template and 9 to 13 % of their own
    text, around the share at which they are near duplicates: the worst case of the index."""
    from fastlm.data.near_duplicates import resolve

    rng = np.random.default_rng(0)
    template = rng.integers(0, 1 << 63, 400).astype(np.uint64)
    shares = rng.uniform(0.09, 0.13, count)
    texts = [rng.integers(0, 1 << 63, int(400 * s / (1 - s))).astype(np.uint64) for s in shares]
    sets = [np.unique(np.concatenate((template, text))) for text in texts]
    lengths = np.array([len(array) for array in sets])
    start = time.process_time()
    resolve(np.arange(count), lengths, sets.__getitem__, THRESHOLD)
    return time.process_time() - start


def growth() -> dict:
    few, many = 3_000, 12_000
    seconds = [templated_site(count) for count in (few, many)]
    note = f"{few:,} pages {seconds[0]:.1f} s, {many:,} pages {seconds[1]:.1f} s; linear is 4"
    ratio = round(seconds[1] / seconds[0], 2)
    return row("one templated site, time of 4 times the pages", ratio, 5, "times", note)


def row(bar: str, value, target, unit: str, note: str) -> dict:
    return {
        "bar": f"near duplicates: {bar}", "value": value, "target": target, "unit": unit,
        "note": note,
    }  # fmt: skip


def rows(count: int = 20_000) -> list[dict]:
    """Measure; return {bar, value, target, unit, note} of each bar. Some 3 minutes."""
    from fastlm.data.near_duplicates import band_keys, find
    from fastlm.data.shingles import shingles

    texts = documents(count)
    sets = word_sets(texts)
    start = time.process_time()
    pairs = exact_join(sets)
    join = time.process_time() - start
    expected = exact_removals(sets, pairs)
    arrays = [shingles(text) for text in texts]
    keys = band_keys(arrays)
    proposed = sum(bool((keys[i] == keys[j]).any()) for i, j in pairs)
    duplicates = find(texts, THRESHOLD)
    removed = {d.removed for d in duplicates}
    wrong = sum(similarity(sets[d.removed], sets[d.kept]) < THRESHOLD for d in duplicates)
    plain = connected(arrays, 14, 8)
    plain_wrong = sum(similarity(sets[i], sets[j]) < THRESHOLD for i, j in plain)
    plain_removed = {i for i, _ in plain}
    plain_pairs = sum(not plain_removed & {*pair} for pair in pairs)
    size = sum(len(text.encode()) for text in texts)
    note = f"{len(pairs):,} true pairs of {len(texts):,} documents, {size / 1e6:.0f} MB"
    removals = f"{len(removed):,} removed, {len(expected):,} by the exact join ({join:.0f} s)"
    return [
        row("recall of pairs at 0.8", round(proposed / len(pairs), 4), 0.97, "share", note),
        row(
            "recall of removals", round(len(removed & expected) / len(expected), 4), 0.97, "share",
            removals,
        ),
        row("wrong removals", wrong, 0, "documents", "similarity to the one that stays < 0.8"),
        row(
            "wrong removals, 14 x 8 without a comparison", plain_wrong, None, "documents",
            f"of {len(plain):,} removed; {plain_pairs:,} true pairs remain",
        ),
        growth(), *speeds(texts),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=20_000)
    print_rows(rows(parser.parse_args().documents), ("rensa", "numpy", "datasketch", "datatrove"))


if __name__ == "__main__":
    main()
