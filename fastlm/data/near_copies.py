"""Find near copies of some texts: in the signatures of a finished build, and in later builds.

A file of signatures has the keys of the bands (`fastlm.data.near_duplicates.band_keys`) of each
document of a part, 4 bytes a band and 80 bytes a document at threshold 0.8, so that a text finds
its candidates without the documents. They are then compared exactly.

`signature_of` is a text's keys as one line for the forget log. It has neither words nor n-grams: a
key is a hash of the smallest hashes of the whole text. Rejected: the hashes of all 5-grams, which
would allow exact comparison, but also to recover the text, by guessing one word after the other.
Later documents are therefore compared by signature alone: two equal keys and a similar length.
Such a comparison finds 0.98 of copies at 0.8, and takes 0.24 of documents at 0.6 and 0.04 at 0.5
for copies; what was forgotten must not return.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastlm.data.dedup import THRESHOLD
from fastlm.data.near_duplicates import band_keys, bands
from fastlm.data.shingles import jaccard, shingles
from fastlm.errors import InputError
from fastlm.files import atomic_file, reason

SIGNATURES = "signatures"  # folder of a corpus: signatures/SPLIT/NNNNN.npz
PREFIX = "near-"
FORMAT = 1  # of `shingles` and the hashes of bands
MIN_SHARED_KEYS = 2  # of a copy that is known by its signature alone
BATCH_CHARACTERS = 1 << 22  # of texts signed at a time


@dataclass(frozen=True)
class Signatures:
    """The ids and the band keys of documents. keys: uint32 (documents, bands), the upper halves."""

    ids: list[str]
    keys: np.ndarray
    threshold: float


def signature_format() -> str:
    """Return what keys depend on; keys of different formats cannot be compared."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    return f"{PREFIX}{FORMAT}-{RMinHash.ALGORITHM_VERSION}"


def save_signatures(
    path: Path, ids: Sequence[str], keys: np.ndarray, threshold: float = THRESHOLD
) -> None:
    """Write the `band_keys` of documents to a file (npz), the same bytes for the same values.

    Args:
        ids: the id of each document, such as its number in the part.
        keys: uint64 (documents, bands).
        threshold: with which the keys were computed.
    """
    names = [id.encode("utf-8", "surrogatepass") for id in ids]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez(
            file, format=np.array(signature_format()), threshold=np.array(threshold),
            keys=_upper_half(keys), ids=np.frombuffer(b"".join(names), np.uint8),
            ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        )  # fmt: skip


def load_signatures(path: Path) -> Signatures:
    """Read a file of `save_signatures`. InputError: damaged, or of another version of hashes."""
    import zipfile

    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            format, keys = str(arrays["format"]), arrays["keys"]
            names, ends = arrays["ids"].tobytes(), arrays["ends"].tolist()
            threshold = float(arrays["threshold"])
        ids = [names[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends)]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: expected signatures of documents: {reason(error)}") from None
    if format != signature_format():
        raise InputError(f"{path}: expected {signature_format()}, got {format}")
    if keys.dtype != np.uint32 or keys.ndim != 2 or len(keys) != len(ids):
        raise InputError(f"{path}: expected keys of {len(ids)} documents, got {keys.shape}")
    return Signatures(ids, keys, threshold)


def candidates(signatures: Signatures, text: str) -> list[str]:
    """Return the ids of the documents that share a band key with a text."""
    keys = _upper_half(band_keys([shingles(text)], signatures.threshold))
    shared = (signatures.keys == keys).any(axis=1) if keys.any() else np.zeros(0, bool)
    return [signatures.ids[i] for i in np.flatnonzero(shared)]


def find_in(
    path: Path, text: str, get_text: Callable[[str], str], threshold: float = THRESHOLD
) -> list[tuple[str, float]]:
    """Return (id, exact similarity) of the near copies of a text in a file of signatures.

    Args:
        path: a file of `save_signatures`, with bands for ``threshold`` or a lower one.
        get_text: returns the text of a document by its id.
        threshold: the smallest similarity of a copy.
    """
    query = shingles(text)
    pairs = (
        (id, jaccard(query, shingles(get_text(id))))
        for id in candidates(load_signatures(path), text)
    )
    return [(id, similarity) for id, similarity in pairs if similarity >= threshold]


def _upper_half(keys: np.ndarray) -> np.ndarray:
    return (keys >> np.uint64(32)).astype(np.uint32)


def signature_of(text: str) -> str:
    """Return the signature of a text for the forget log: ``FORMAT:SHINGLES:HEX``, "" if it has
    no words."""
    array = shingles(text)
    keys = band_keys([array])[0].astype("<u8")
    return f"{signature_format()}:{len(array)}:{keys.tobytes().hex()}" if len(array) else ""


def is_signature(key: str) -> bool:
    """Return whether a key of the forget log is one of `signature_of`."""
    return key.startswith(PREFIX)


class NearCopies:
    """Recognises near copies of texts.

    Args:
        texts: compared exactly.
        signatures: of `signature_of`, of texts that are no longer there.

    A copy has a similarity of THRESHOLD or more. InputError: a damaged signature.
    """

    def __init__(self, texts: Iterable[str] = (), signatures: Iterable[str] = ()):
        self._sets = [array for text in texts if len(array := shingles(text))]
        self._keys = band_keys(self._sets)
        parsed = [_parse(signature) for signature in dict.fromkeys(signatures)]
        self._signature_sizes = np.array([size for size, _ in parsed], np.int64)
        width = self._keys.shape[1]
        self._signature_keys = np.array([k for _, k in parsed], np.uint64).reshape(-1, width)
        self._all_keys = np.unique(np.concatenate((self._keys, self._signature_keys)))

    def __bool__(self) -> bool:
        return len(self._all_keys) > 0

    def similarities(self, texts: Iterable[str]) -> Iterator[float]:
        """Yield for each text its similarity to the nearest text, 0.0 if it is no near copy. It is
        exact, or, of a text known by its signature, estimated as (equal keys / keys)^(1 / rows).
        """
        batch, characters = [], 0
        for text in texts:
            batch.append(shingles(text))
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield from self.match(batch)
                batch, characters = [], 0
        yield from self.match(batch)

    def match(self, sets: list[np.ndarray], keys: np.ndarray | None = None) -> list[float]:
        """Return what `similarities` yields, of sets of `shingles`.

        Args:
            keys: their `band_keys` at the default threshold, if they are there already.
        """
        if not self:
            return [0.0] * len(sets)
        keys = band_keys(sets) if keys is None else keys
        similarities = [0.0] * len(sets)
        for i in np.flatnonzero(np.isin(keys, self._all_keys).any(axis=1)):
            similarities[i] = self._similarity(sets[i], keys[i])
        return similarities

    def _similarity(self, array: np.ndarray, keys: np.ndarray) -> float:
        if not len(array):
            return 0.0
        near = np.flatnonzero((self._keys == keys).any(axis=1))
        exact = max((jaccard(array, self._sets[i]) for i in near), default=0.0)
        shared = (self._signature_keys == keys).sum(axis=1)
        sizes = self._signature_sizes
        is_similar = (
            (shared >= min(MIN_SHARED_KEYS, len(keys)))
            & (sizes >= THRESHOLD * len(array))
            & (len(array) >= THRESHOLD * sizes)
        )
        max_shared = int(shared[is_similar].max(initial=0))
        estimate = (max_shared / len(keys)) ** (1 / bands(THRESHOLD).rows)
        return exact if exact >= THRESHOLD else estimate


def _parse(signature: str) -> tuple[int, np.ndarray]:
    """Return the number of shingles and the keys. InputError: damaged, or of another format."""
    version, _, rest = signature.partition(":")
    if version != signature_format():
        raise InputError(f"signature: expected {signature_format()}, got {version!r:.100}")
    size, _, digits = rest.partition(":")
    try:
        keys = np.frombuffer(bytes.fromhex(digits), "<u8")
        if len(keys) != bands(THRESHOLD).count or int(size) < 1:
            raise ValueError
    except ValueError:
        raise InputError(f"signature: expected SHINGLES:HEX, got {rest!r:.100}") from None
    return int(size), keys.astype(np.uint64)
