"""Recipes: a whole run as one TOML file, read into typed dataclasses.

Every table is the dataclass of the stage it configures (``[pretrain]`` is ``TrainOptions`` and the
batch's shape), so that a recipe has no names of its own. An unknown key is refused with the
nearest known one, a wrong type with both types. Hydra- and YAML-style composition was left out: a
run is read from top to bottom in one file.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fastlm.config import ModelConfig
from fastlm.data.filter import TECHNICAL, WEB
from fastlm.data.prepare import DataOptions
from fastlm.errors import InputError
from fastlm.quant.model import check_options
from fastlm.tokenizer import SPECIAL_TOKENS, check_vocab_size
from fastlm.train.loop import TrainOptions

T = TypeVar("T")
RULES = {"technical": TECHNICAL, "web": WEB, "none": ()}  # names for rules = ["technical"]


@dataclass(frozen=True)
class DataSection(DataOptions):
    """``sources`` as ``fastlm data prepare`` takes them."""

    sources: tuple[str, ...] = ()


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
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as e:
        raise InputError(f"recipe {path}: cannot be read: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"recipe {path}: wanted TOML: {e}") from None
    for override in overrides:
        _override(table, override)
    try:
        return parse_recipe(table)
    except InputError as e:
        raise InputError(f"recipe {path}: {e}") from None


def parse_recipe(table: Mapping[str, Any]) -> Recipe:
    recipe = _build(Recipe, table, "")
    if not recipe.data.sources:
        raise InputError("data.sources: wanted at least one source, got none")
    known = {f.name for f in fields(ModelConfig)} - {"extra"} | {"rope_theta", "rope_scaling"}
    for key in recipe.model:
        if key not in known:
            raise InputError(_unknown(f"model.{key}", key, known))
    if not re.fullmatch(r"\w[\w .+-]*", recipe.name):
        raise InputError(f"name: wanted the name of a folder below runs/, got {recipe.name!r}")
    if recipe.seed < 0:
        raise InputError(f"seed: wanted 0 or more, got {recipe.seed}")
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
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(f"set: {parent} of {key} is no table")
    table[last] = parsed


def _build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in known:
            raise InputError(_unknown(where + key, key, known))
        values[key] = _convert(value, hints[key], where + key)
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where}{name}: wanted, is missing")
    if cls is DataSection and "rules" in values:
        values["rules"] = tuple(r for name in values["rules"] for r in RULES.get(name, (name,)))
    return cls(**values)


def _unknown(full: str, key: str, known) -> str:
    """The key of the same name in another section, or else the nearest of this one."""
    hints = get_type_hints(Recipe)
    sections = [name for name, hint in hints.items() if is_dataclass(hint)]
    elsewhere = [f"{s}.{key}" for s in sections if key in get_type_hints(hints[s])]
    near = elsewhere or [repr(difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0])]
    return f"{full}: unknown key; the nearest known one is {' or '.join(near)}"


def _convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as ``hint``; TOML's whole numbers are also floats, its arrays tuples."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (inner,) = (a for a in args if a is not NoneType)  # only X | None is used in recipes
        return _convert(value, inner, where)
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return _build(hint, value, where + ".")  # type: ignore[arg-type]
    elif origin is tuple:
        if isinstance(value, list):
            if args[-1] is not Ellipsis and len(value) != len(args):
                raise InputError(f"{where}: wanted {len(args)} values, got {len(value)}")
            kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
            return tuple(
                _convert(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds))
            )
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:
        return value
    raise InputError(f"{where}: wanted {_name(hint)}, got {_name(type(value))} {value!r}")


def _name(hint: Any) -> str:
    if is_dataclass(hint) or hint is dict or get_origin(hint) is dict:
        return "a table"
    if get_origin(hint) is tuple or hint is list:
        return "an array"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, str(hint))


def _at_least_one(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise InputError(f"{name}: wanted 1 or more, got {getattr(section, name)}")
