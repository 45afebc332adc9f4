"""Which two models scores and decisions are about: the one that serves and the new one.

They are told by the ids of their content (`fastlm.evals.suite.id_of`), so that a model may be moved
or copied. A quantized model has an id of its own: what was measured of it says nothing about the
model that it was made from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastlm.errors import InputError

OLD, NEW = "old", "new"
SHORT = 12  # characters of an id that are shown


@dataclass(frozen=True)
class Model:
    """A model by its ``name`` (a stage or a path) and the ``id`` of its content."""

    name: str
    id: str

    def __str__(self) -> str:
        return f"{self.name} (id {self.id[:SHORT]})"


Pair = Mapping[str, Model]  # OLD, NEW; one that is not known is missing


def pair_of(models: Sequence[Model]) -> Pair:
    """Return the pair among the "ids" of a scores.json: the first is the old one, the last the new
    one, a single one the new one. Empty: another program wrote it.
    """
    if len(models) > 1:
        return {OLD: models[0], NEW: models[-1]}
    return {NEW: models[0]} if models else {}


def common(pairs: Sequence[tuple[str, Pair]]) -> Pair:
    """Return the pair that all scores are about; ``pairs`` has the folder of each. InputError:
    they are about different ones.
    """
    found: dict[str, tuple[str, Model]] = {}
    for folder, pair in pairs:
        for key, model in pair.items():
            first, known = found.setdefault(key, (folder, model))
            if known.id != model.id:
                raise InputError(
                    f"scores: wanted scores of one {key} model, got {first} of {known} and"
                    f" {folder} of {model}"
                )
    return {key: found[key][1] for key in (OLD, NEW) if key in found}


def check_decided(wanted: Pair, decided: Pair, where: str) -> None:
    """Raise InputError if a decision names other models than ``wanted``."""
    if any(key in decided and decided[key].id != wanted[key].id for key in wanted):
        raise InputError(
            f"decision: wanted one about {_told(wanted)}, got one about {_told(decided)}: {where}"
        )


def _told(pair: Pair) -> str:
    return " and ".join(f"the {key} model {pair[key]}" for key in (NEW, OLD) if key in pair)
