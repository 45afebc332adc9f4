"""The mixture of the training text: weights of documents by source, language and quality bucket.

    [stage.mix]                     # in a recipe, below the [[stage]] of kind "data"
    max_epochs = 4
    sources = {"docs/" = 2, "*" = 0.5}
    languages = {de = 1.5, fi = 0}
    buckets = "model"

A document's weight is the product of three, each 1 unless it is stated; ``"*"`` states it for all
sources or languages that are not named. The weight, at most ``max_epochs``, is the expected number
of copies in the training part: 2.3 gives two copies, and a third one for 3 of 10 documents, chosen
by the hash of the text. So the same plan gives the same copies on any number of workers, and a
larger weight keeps what a smaller one kept. A weight below 1 samples without repetition, 0 drops.

Rejected: a number of tokens per source, which needs a tokenizer and changes all choices when a page
is added; weights when shards are read, which would hide from the corpus what is trained on. How
often text can repeat: up to 4 epochs are nearly as good as new text (Muennighoff et al. 2023,
arXiv:2305.16264).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from fastlm.errors import InputError, unknown_key

BUCKETS = 20  # of `fastlm.data.quality`
MAX_WEIGHT = 100
OTHERS = "*"
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class Mix(TypedDict, total=False):
    """The table of a recipe.

    sources, languages: weights by name; "*": of all others (default 1).
    buckets: the weights of the buckets of quality, the worst first; "model": those of the quality
        model (the default if there is one); "equal": all 1.
    max_epochs: a document is repeated at most so often, on average.
    """

    sources: dict[str, float]
    languages: dict[str, float]
    buckets: list[float] | Literal["model", "equal"]
    max_epochs: float


def check_mix(mix: Mapping[str, Any], *, has_languages: bool, has_quality: bool) -> None:
    """Check a `Mix`. InputError names the key.

    has_languages, has_quality: documents have a language, a quality bucket.
    """
    for key in mix:
        if key not in Mix.__annotations__:
            raise InputError(unknown_key(f"mix.{key}", key, [*Mix.__annotations__]))
    for name in ("sources", "languages"):
        for key, weight in mix.get(name, {}).items():
            _check_weight(f"mix.{name}.{key}", weight)
    if mix.get("languages") and not has_languages:
        raise InputError("mix.languages: expected a language_method that finds them, got 'off'")
    buckets = mix.get("buckets", "equal")
    if buckets != "equal" and not has_quality:
        raise InputError("mix.buckets: expected a quality model, which finds them, got none")
    if not isinstance(buckets, str):
        if len(buckets) != BUCKETS:
            raise InputError(f"mix.buckets: expected {BUCKETS} weights, got {len(buckets)}")
        for bucket, weight in enumerate(buckets):
            _check_weight(f"mix.buckets.{bucket}", weight)
    elif buckets not in ("model", "equal"):
        raise InputError(f"mix.buckets: expected weights, model or equal, got {buckets!r:.40}")
    limit = mix.get("max_epochs", 1.0)
    if not (_is_number(limit) and 0 < limit <= MAX_WEIGHT):
        raise InputError(f"mix.max_epochs: expected more than 0, at most {MAX_WEIGHT}, got {limit}")


def check_names(mix: Mapping[str, Any], sources: Sequence[str], languages: Sequence[str]) -> None:
    """Refuse weights of unknown sources and languages. InputError names those that exist."""
    for name, valid in (("sources", sources), ("languages", languages)):
        for key in mix.get(name, {}):
            if key != OTHERS and valid and key not in valid:
                choices = ", ".join(valid) if name == "sources" else "ISO 639 codes such as en"
                raise InputError(f"mix.{name}: expected {choices} or *, got {key!r:.80}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_weight(name: str, weight: Any) -> None:
    if not (_is_number(weight) and 0 <= weight <= MAX_WEIGHT):
        raise InputError(f"{name}: expected a weight from 0 to {MAX_WEIGHT}, got {weight!r:.40}")


def complete(mix: Mapping[str, Any], quality: str | None) -> dict[str, Any]:
    """Return a `Mix` with the weights of the buckets written out, those of the model ``quality``
    where it does not state others.
    """
    buckets: Any = mix.get("buckets", "model" if quality else "equal")
    if buckets == "model" and quality:
        from fastlm.data.quality import QualityModel

        buckets = list(QualityModel.load(quality).weights)
    elif buckets == "equal":
        buckets = [1.0] * BUCKETS
    return {**mix, "buckets": buckets}


class MixWeights:
    """Weighs documents by a `complete` mix."""

    def __init__(self, mix: Mapping[str, Any]):
        self.tables: dict[str, Mapping[str, float]] = {
            "sources": mix.get("sources", {}), "languages": mix.get("languages", {}),
            "buckets": {str(bucket): weight for bucket, weight in enumerate(mix["buckets"])},
        }  # fmt: skip
        self.max_epochs = mix.get("max_epochs", math.inf)

    def key_weight(self, name: str, key: str) -> float:
        """Return the weight of one source, language or bucket."""
        table = self.tables[name]
        return table.get(key, table.get(OTHERS, 1.0))

    def weight(self, keys: Mapping[str, str]) -> float:
        """Return the expected number of copies of a document with the `mix_keys` ``keys``."""
        product = math.prod(self.key_weight(name, key) for name, key in keys.items())
        return min(product, self.max_epochs)

    def drop_reason(self, keys: Mapping[str, str]) -> str:
        """Return why a document that gets no copy is dropped."""
        for name, key in keys.items():
            if self.key_weight(name, key) == 0:
                return f"{name.removesuffix('s')} {key} has weight 0"
        return "not drawn by its weight"


def mix_keys(source: str, meta: Mapping[str, Any]) -> dict[str, str]:
    """Return the source, language and bucket of a document, without those that it has not."""
    keys = {"sources": source}
    if "language" in meta:
        keys["languages"] = str(meta["language"])
    if "quality_bucket" in meta:
        keys["buckets"] = str(meta["quality_bucket"])
    return keys


def copies(weight: float, key: int) -> int:
    """Return how many copies a document gets: ``weight`` on average over all keys.

    key: the hash of its text, 64 bits. It is mixed first: held-out documents are those with small
    keys.
    """
    value = (key ^ key >> 31) * _GOLDEN & _MASK
    value = (value ^ value >> 29) * _GOLDEN & _MASK
    count = math.floor(weight)
    return count + (value < (weight - count) * 2**64)
