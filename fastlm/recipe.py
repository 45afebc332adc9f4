"""Recipes: a whole run as one TOML file, read into typed dataclasses.

Every table is the dataclass of the stage it configures (``[pretrain]`` is ``TrainOptions`` and the
batch's shape), so that a recipe has no names of its own. An unknown key is refused with the
nearest known one, a wrong type with both types. Hydra- and YAML-style composition was left out: a
run is read from top to bottom in one file.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fastlm.config import ModelConfig
from fastlm.data.filter import TECHNICAL, WEB
from fastlm.data.prepare import DataOptions
from fastlm.errors import InputError
from fastlm.files import read_text
from fastlm.quant.model import check_options
from fastlm.tokenizer import SPECIAL_TOKENS, check_vocab_size
from fastlm.train.loop import TrainOptions
from fastlm.typed import build, unknown

MAX_BYTES = 2**16  # of a recipe
MAX_DOTS = 1000  # in a line: tomllib takes time quadratic in the parts of a key
_HUGE = re.compile(r"0[box][\da-fA-F_]{65}")  # numbers beyond TOML's 64 bits
RULES = {"technical": TECHNICAL, "web": WEB, "none": ()}  # names for rules = ["technical"]


@dataclass(frozen=True)
class DataSection(DataOptions):
    """``sources`` as ``fastlm data prepare`` takes them; ``rules`` may be names of `RULES`."""

    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = tuple(r for name in self.rules for r in RULES.get(name, (name,)))
        object.__setattr__(self, "rules", rules)


@dataclass(frozen=True)
class TokenizerSection:
    """``train_bytes``: at most that much of the training text is counted."""

    vocab_size: int = 8192
    train_bytes: int = 1 << 26

    def check(self) -> None:
        check_vocab_size(self.vocab_size, SPECIAL_TOKENS)
        _at_least_one(self, "train_bytes")


@dataclass(frozen=True)
class PretrainSection(TrainOptions):
    """TrainOptions and the shape of a micro-batch."""

    batch_size: int = 16
    seq_len: int = 256

    def check(self) -> None:
        super().check()
        _at_least_one(self, "batch_size", "seq_len")


@dataclass(frozen=True)
class EvalSection:
    """The last ``stride`` tokens of every window of the training length are scored; the rest
    is context.
    """

    stride: int = 128
    batch_size: int = 32

    def check(self) -> None:
        _at_least_one(self, "stride", "batch_size")


@dataclass(frozen=True)
class QuantizeSection:
    """As ``fastlm.quantize``; ``embeddings`` and ``head``: bits, 16 to leave them, 0 for those
    of ``format``.
    """

    format: str = "w4a16"
    group_size: int = 128
    method: str = "rtn"
    embeddings: int = 0
    head: int = 0

    def check(self) -> None:
        check_options(**asdict(self))


@dataclass(frozen=True)
class Recipe:
    """``model`` holds ModelConfig's names; the vocabulary is the tokenizer's and need not be
    given.
    """

    name: str
    description: str = ""
    seed: int = 0
    data: DataSection = field(default_factory=DataSection)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    model: dict[str, Any] = field(default_factory=dict)
    pretrain: PretrainSection = field(default_factory=lambda: PretrainSection(max_steps=1000))
    eval: EvalSection = field(default_factory=EvalSection)
    quantize: QuantizeSection = field(default_factory=QuantizeSection)

    def model_config(self, vocab_size: int, eos_id: int | None) -> ModelConfig:
        """The context is the training length unless the recipe says otherwise."""
        given = {
            "max_position_embeddings": self.pretrain.seq_len,
            "tie_word_embeddings": True,
            "bos_token_id": eos_id,
            "eos_token_id": eos_id,
            **self.model,
            "vocab_size": vocab_size,
        }
        return ModelConfig.from_dict(given)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe. ``overrides``: "pretrain.max_seconds=60", the value in TOML (a bare word
    is a string).

    InputError: no such file, not TOML, an unknown or missing key, a wrong type, a value that a
    stage refuses.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"recipe {path}: cannot be read: No such file or directory")
    try:
        table = _toml(read_text(path, MAX_BYTES))
    except InputError as e:
        raise InputError(f"recipe {e}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"recipe {path}: wanted TOML: {e}") from None
    for override in overrides:
        _override(table, override)
    try:
        return parse_recipe(table)
    except InputError as e:
        raise InputError(f"recipe {path}: {e}") from None


def _toml(text: str) -> dict[str, Any]:
    """ValueError, RecursionError: no TOML."""
    if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
        raise ValueError(f"a line has more than {MAX_DOTS:,} dots")
    if huge := _HUGE.search(text):
        raise ValueError(f"{huge[0][:20]}... has more than 64 bits")
    return tomllib.loads(text)


def _check_sections(table: Mapping[str, Any]) -> None:
    """A key that stands in no section, or in the wrong one, is refused with those that have it."""
    hints = {k: h for k, h in get_type_hints(Recipe).items() if is_dataclass(h)}
    names = {section: {f.name for f in fields(hint)} for section, hint in hints.items()}
    known = {f.name for f in fields(Recipe)}
    places = [("", table, known)]
    places += [(f"{s}.", table[s], names[s]) for s in names if isinstance(table.get(s), Mapping)]
    for where, keys, here in places:
        for key in keys:
            found = [f"{s}.{key}" for s in names if key in names[s]]
            if key not in here and found:
                raise InputError(
                    f"{where}{key}: unknown key; the nearest known one is {' or '.join(found)}"
                )


def parse_recipe(table: Mapping[str, Any]) -> Recipe:
    _check_sections(table)
    recipe = build(Recipe, table)
    if not recipe.data.sources:
        raise InputError("data.sources: wanted at least one source, got none")
    known = {f.name for f in fields(ModelConfig)} - {"extra"} | {"rope_theta", "rope_scaling"}
    for key in recipe.model:
        if key not in known:
            raise InputError(unknown(f"model.{key}", key, known))
    if not re.fullmatch(r"\w[\w .+-]*", recipe.name):
        raise InputError(f"name: wanted the name of a folder below runs/, got {recipe.name!r}")
    if recipe.seed < 0:
        raise InputError(f"seed: wanted 0 or more, got {recipe.seed}")
    if recipe.seed >= 2**63:
        raise InputError(f"seed: wanted less than 2^63, got {recipe.seed}")
    # all of it before the first stage: the last one runs when the training is over
    for name in ("data", "tokenizer", "pretrain", "eval", "quantize"):
        try:
            getattr(recipe, name).check()
        except InputError as e:
            raise InputError(f"{name}.{e}") from None
    if recipe.eval.stride > recipe.pretrain.seq_len:
        raise InputError(
            f"eval.stride: wanted at most pretrain.seq_len = {recipe.pretrain.seq_len},"
            f" got {recipe.eval.stride}"
        )
    try:
        config = recipe.model_config(recipe.tokenizer.vocab_size, 0)
    except InputError as e:
        raise InputError(f"model.{e}") from None
    bits = recipe.quantize
    if config.tie_word_embeddings and bits.head not in (0, bits.embeddings):
        raise InputError(
            f"quantize.head: shares its weight with the embeddings: wanted 0, got {bits.head}"
        )
    return recipe


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"set: wanted KEY=VALUE, as pretrain.max_seconds=60, got {text!r}")
    if len(text) > MAX_BYTES:
        raise InputError(f"set: wanted at most {MAX_BYTES:,} characters, got {len(text):,}")
    try:
        parsed = _toml(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(f"set: {parent} of {key} is no table")
    table[last] = parsed


def _at_least_one(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise InputError(f"{name}: wanted 1 or more, got {getattr(section, name)}")
