"""Signatures of a finished build, and copies of texts that are known by their signature alone."""

import random

import numpy as np
import pytest

from fastlm.data.near_copies import (
    NearCopies,
    find_in,
    load_signatures,
    save_signatures,
    signature_of,
)
from fastlm.data.near_duplicates import band_keys
from fastlm.data.shingles import jaccard, shingles
from fastlm.errors import InputError


def words(seed: int, count: int = 300) -> list[str]:
    rng = random.Random(seed)
    return [f"word{rng.randrange(5000)}" for _ in range(count)]


def edit(text: str, count: int) -> str:
    """Replace ``count`` words, spread evenly: each changes five 5-grams."""
    parts = text.split()
    for i in range(count):
        parts[(2 * i + 1) * len(parts) // (2 * count)] = f"edit{i}"
    return " ".join(parts)


TEXTS = [" ".join(words(seed)) for seed in range(40)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "signatures/train/00000.npz"
    keys = band_keys([shingles(text) for text in [*TEXTS, ""]])
    save_signatures(path, [f"ünï:{i}" for i in range(41)], keys)
    return path


def test_a_text_finds_its_copies_in_a_finished_build(path):
    read = []

    def get_text(id):
        read.append(id)
        return TEXTS[int(id.split(":")[1])]

    copy = edit(TEXTS[7], 4)
    similarity = jaccard(shingles(copy), shingles(TEXTS[7]))
    assert 0.8 < similarity < 0.9
    assert find_in(path, copy, get_text) == [("ünï:7", similarity)]
    assert read == ["ünï:7"]  # no other text is read
    assert find_in(path, edit(TEXTS[7], 10), get_text) == []
    assert find_in(path, "", get_text) == []


def test_signatures_are_80_bytes_a_document_and_the_same_bytes(path):
    signatures = load_signatures(path)
    assert signatures.ids[1] == "ünï:1" and signatures.keys.shape == (41, 20)
    first = path.read_bytes()
    keys = band_keys([shingles(text) for text in [*TEXTS, ""]])
    save_signatures(path, signatures.ids, keys)
    assert path.read_bytes() == first
    assert signatures.keys.nbytes == 41 * 80


def test_damaged_signatures_are_refused(path):
    data = path.read_bytes()
    for damaged in (data[:1000], b"", b"not a file of arrays"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="expected signatures of documents"):
            load_signatures(path)
    with pytest.raises(InputError, match="expected signatures of documents"):
        load_signatures(path.with_name("missing.npz"))
    path.write_bytes(data)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "format": np.array("near-0-0")})
    with pytest.raises(InputError, match="expected near-1-2, got near-0-0"):
        load_signatures(path)
    np.savez(path, **{**arrays, "keys": arrays["keys"][:-1]})
    with pytest.raises(InputError, match="expected keys of 41 documents"):
        load_signatures(path)


def test_copies_of_texts_are_compared_exactly():
    copies = NearCopies(TEXTS[:5])
    candidates = [edit(TEXTS[3], 3), TEXTS[9], edit(TEXTS[1], 20), "", TEXTS[0].upper()]
    expected = [jaccard(shingles(candidates[0]), shingles(TEXTS[3])), 0, 0, 0, 1]
    assert list(copies.similarities(candidates)) == expected
    assert not NearCopies() and list(NearCopies().similarities(["a text"])) == [0]


def test_copies_of_a_signature():
    """By formula two of 20 keys are equal in 0.98 of pairs at 0.8, and 0.04 at 0.5."""
    copies = NearCopies(signatures=[signature_of(text) for text in TEXTS])
    near = [edit(text, 5) for text in TEXTS]  # 0.845
    assert sum(similarity > 0 for similarity in copies.similarities(near)) >= 38
    far = [edit(text, 28) for text in TEXTS]  # about 0.36
    assert sum(similarity > 0 for similarity in copies.similarities(far)) <= 2
    # a page that only contains the text is no copy of it
    longer = [f"{text} {' '.join(words(1000 + i, 100))}" for i, text in enumerate(TEXTS)]
    assert not any(copies.similarities(longer))
    assert set(copies.similarities(TEXTS)) == {1.0}


def test_a_signature_has_no_word_and_no_hash_of_an_n_gram():
    text = TEXTS[0]
    digits = signature_of(text).split(":")[-1]
    stored = np.frombuffer(bytes.fromhex(digits), "<u8")
    assert not np.isin(stored, shingles(text)).any()
    assert signature_of("--") == ""


@pytest.mark.parametrize(
    "signature", ["", "x", "near-1-1:3:00", "near-1-2:3:00", "near-1-2:0:" + "00" * 160]
)
def test_a_damaged_signature_is_refused(signature):
    with pytest.raises(InputError, match="signature: expected"):
        NearCopies(signatures=[signature])
