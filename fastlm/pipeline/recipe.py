"""Read and check recipes: a whole run as one TOML file, a list of stages.

    name = "mine"
    seed = 1

    [[stage]]
    kind = "data"
    sources = ["docs/"]

    [[stage]]
    name = "small"                   # default: the kind
    kind = "pretrain"
    from = "shards"                  # default: the last stage that made what this one needs

An external input may have a name, too, so that one --set changes it everywhere:

    [inputs]
    old = "runs/chat/ppo"

The other keys of a stage are the fields of its class (`fastlm.stages`). The error for an unknown
key names the nearest valid one; that for a wrong type names both types. Composition in the style of
Hydra or YAML was left out: one file describes a run from top to bottom.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import InputError, unknown_key
from fastlm.files import read_json
from fastlm.pipeline.stage import Facts, InputSpec, Stage, options_of
from fastlm.schema import parse_toml, read_toml, validate

MAX_BYTES = 2**16  # of a recipe
_NAME = re.compile(r"\w([\w .+-]{0,98}[\w+-])?")
Kinds = Mapping[str, type[Stage]]  # kind -> class of the stage
SCHEMES = ("model", "pypi", "sdist", "deb")  # of inputs from packages
INPUTS = "inputs"
KEYS = {"name": str, "description": str, "seed": int, INPUTS: dict, "stage": list}
# Files and folders of a run and tables of a recipe, whose names no stage may have
RESERVED = re.compile(r"inputs|report|.*\.html|.*\.jsonl?|previous(-\d+)?")


@dataclass(frozen=True)
class RecipeStep:
    """One ``[[stage]]``. ``inputs``: name -> stages that provide it, or paths outside the run."""

    name: str
    stage: Stage
    inputs: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every step takes its inputs from earlier steps or from paths."""

    name: str
    description: str
    seed: int
    steps: tuple[RecipeStep, ...]
    table: Mapping[str, Any]  # as read, with overrides
    kinds: Kinds  # all that a recipe may have

    def step(self, name: str) -> RecipeStep | None:
        return next((step for step in self.steps if step.name == name), None)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, kinds: Kinds) -> Recipe:
    """Read and check the recipe at ``path``, whose stages are of ``kinds``.

    ``overrides``: "NAME.key=value" with the name of a stage, "inputs.key=value", or "seed=2". The
    value is TOML; a bare word is a string. A file of settings (`Stage.settings_in`) that a TOML
    file names is looked for from that file's folder; all other paths, those of overrides and of a
    run's recipe.json are used as they are.

    InputError: no such file, not TOML, an unknown or missing key, a wrong type, a value that a
    stage refuses.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"recipe {path}: cannot be read: No such file or directory")
    is_json = path.suffix == ".json"  # recipe.json of a run folder is a recipe too
    try:
        table = read_json(path) if is_json else read_toml(path, MAX_BYTES)[0]
    except InputError as e:
        raise InputError(f"recipe {e}") from None
    try:
        # names of settings files become paths below the recipe's folder
        for entry in () if is_json else _entries(table, kinds):
            for key in kinds[entry["kind"]].settings_in:
                *tables, last = key.split(".")
                inner: Any = entry
                for table_name in tables:
                    inner = inner.get(table_name) if isinstance(inner, dict) else None
                value = inner.get(last) if isinstance(inner, dict) else None
                if isinstance(value, str) and value:
                    inner[last] = str(path.parent / value)
                elif isinstance(value, list):
                    inner[last] = [
                        str(path.parent / v) if isinstance(v, str) and v else v for v in value
                    ]
        for override in overrides:
            _override(table, kinds, override)
        return parse_recipe(table, kinds=kinds)
    except InputError as e:
        raise InputError(f"recipe {path}: {e}") from None


def parse_recipe(table: Mapping[str, Any], *, kinds: Kinds) -> Recipe:
    """Check the content of a recipe. InputError as in `load_recipe`."""
    entries = _entries(table, kinds)
    for key, value in table.items():
        if key not in KEYS:
            raise InputError(_misplaced(key, key, [*KEYS], entries, kinds))
        if key != "stage" and type(value) is not KEYS[key]:
            types = {str: "a string", int: "a whole number", dict: "a table"}
            raise InputError(f"{key}: expected {types[KEYS[key]]}, got {value!r:.80}")
    name, seed = table.get("name"), table.get("seed", 0)
    if name is None:
        raise InputError("name: expected the name of the run, got none")
    if not _NAME.fullmatch(name):
        raise InputError(f"name: expected the name of a folder below runs/, got {name!r}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: expected 0 or more and less than 2^63, got {seed}")
    if not entries:
        raise InputError("stage: expected at least one [[stage]], got none")
    parser = _Parser(entries, kinds, seed, table.get(INPUTS, {}))
    facts: dict[str, Facts] = {}
    for entry in entries:
        step = parser.add(entry)
        try:
            step.stage.check()
            input_facts = {
                k: [facts.get(v, {"name": v}) for v in names] for k, names in step.inputs.items()
            }
            # all of it before the first stage runs: the last one runs after the training
            facts[step.name] = {**step.stage.plan(input_facts), "name": step.name}
        except InputError as e:
            raise InputError(f"{step.name}.{e}") from None
    steps = tuple(parser.steps.values())
    used = {source for step in steps for sources in step.inputs.values() for source in sources}
    if unused := [name for name, path in parser.external.items() if path not in used]:
        raise InputError(
            f"{INPUTS}.{unused[0]}: expected a stage that has it as an input, got none"
            " (options such as a list of data files, and --set of a stage's input, take paths)"
        )
    return Recipe(name, table.get("description", ""), seed, steps, table, kinds)


def _entries(table: Mapping[str, Any], kinds: Kinds) -> list[dict[str, Any]]:
    entries = table.get("stage", [])
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        raise InputError("stage: expected a list of tables, [[stage]]")
    for number, entry in enumerate(entries, 1):
        kind = entry.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            near = difflib.get_close_matches(str(kind)[:80], kinds, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"stage {number}.kind: expected one of {', '.join(kinds)}, got {kind!r:.80}{hint}"
            )
    return entries


def _name_of(entry: Mapping[str, Any]) -> Any:
    return entry.get("name", entry["kind"])


class _Parser:
    """Turns the tables of a recipe into ``steps``, one after the other. Each takes its inputs from
    earlier steps or from ``external`` (name -> path)."""

    def __init__(
        self, entries: list[dict[str, Any]], kinds: Kinds, seed: int, external: Mapping[str, Any]
    ):
        self.entries, self.kinds, self.seed, self.external = entries, kinds, seed, external
        self.steps: dict[str, RecipeStep] = {}
        for name, path in external.items():
            if not isinstance(path, str) or not is_outside(path):
                raise InputError(f"{INPUTS}.{name}: expected a path with a /, got {path!r:.80}")
            if is_outside(name) or name in map(_name_of, entries):
                raise InputError(
                    f"{INPUTS}.{name}: expected a name that is neither a stage nor a path"
                )

    def add(self, entry: Mapping[str, Any]) -> RecipeStep:
        """Add and return the step of one ``[[stage]]``."""
        name, cls = _name_of(entry), self.kinds[entry["kind"]]
        if not isinstance(name, str) or not _NAME.fullmatch(name) or RESERVED.fullmatch(name):
            raise InputError(
                f"stage.name: expected a name that is valid and not reserved, got {name!r:.80}"
            )
        if name in self.steps:
            raise InputError(f"stage.name: {name!r} is used twice; expected a name for each stage")
        options = [option.name for option in options_of(cls)]
        input_keys = [*cls.inputs, *(("from", "of") if cls.inputs else ())]
        entry_values = {key: value for key, value in entry.items() if key not in ("kind", "name")}
        for key in entry_values:
            if key not in input_keys and key not in options:
                valid = [*options, *input_keys]
                raise InputError(_misplaced(f"{name}.{key}", key, valid, self.entries, self.kinds))
        values = {key: value for key, value in entry_values.items() if key not in input_keys}
        if "seed" in options:
            values.setdefault("seed", self.seed)
        stage = validate(values, cls, f"{name}.", extra="forbid")
        keys: dict[str, str] = {}  # input -> the key that the recipe used
        for key in filter(input_keys.__contains__, entry_values):
            target = next(iter(stage.inputs)) if key in ("from", "of") else key
            if target not in stage.inputs:
                valid_inputs = ", ".join(stage.inputs)
                raise InputError(f"{name}.{key}: expected one of its inputs {valid_inputs}")
            if target in keys:
                raise InputError(f"{name}.{key}: duplicate key for the input {target!r}")
            keys[target] = key
        sources = {
            key: self.sources(f"{name}.{keys[key]}", entry_values[keys[key]], spec)
            if key in keys
            else self.default_sources(f"{name}.{key}", spec)
            for key, spec in stage.inputs.items()
        }
        self.steps[name] = RecipeStep(name, stage, sources)
        return self.steps[name]

    def sources(self, key: str, value: Any, spec: InputSpec) -> tuple[str, ...]:
        """Check what a recipe names as one input of a stage; return stages and paths."""
        values = value if isinstance(value, list) else [value]
        if not values and spec.optional:
            return ()
        if not values or not all(isinstance(v, str) and v for v in values):
            raise InputError(f"{key}: expected the name of a stage or a path, got {value!r:.80}")
        if len(values) > 1 and not spec.several:
            raise InputError(f"{key}: expected one, got {len(values)}")
        values = [self.external.get(v, v) for v in values]
        if len({*values}) < len(values):
            raise InputError(f"{key}: expected each once, got {', '.join(values):.80}")
        for v in values:
            if not is_outside(v):
                self.check_source(key, v, spec)
        return tuple(values)

    def check_source(self, key: str, name: str, spec: InputSpec) -> None:
        if name in self.steps:
            outputs = self.steps[name].stage.outputs
            if not any(kind in outputs for kind in spec.types):
                raise InputError(
                    f"{key}: expected a stage that makes {' or '.join(spec.types)}; {name!r} makes"
                    f" {' and '.join(outputs)}"
                )
        elif name in map(_name_of, self.entries):
            raise InputError(f"{key}: expected an earlier stage, {name!r} comes later")
        else:
            names = [*self.steps, *self.external]
            near = difflib.get_close_matches(name[:80], names, n=1, cutoff=0.0)
            hint = f"; the nearest one is {near[0]!r}" if near else ""
            raise InputError(
                f"{key}: expected the name of an earlier stage or a path with a /,"
                f" got {name!r:.80}{hint}"
            )

    def default_sources(self, key: str, spec: InputSpec) -> tuple[str, ...]:
        for kind in spec.types if spec.default else ():
            if stages := [s.name for s in self.steps.values() if kind in s.stage.outputs]:
                return (stages[-1],)
        if spec.optional:
            return ()
        types = " or ".join(spec.types)
        raise InputError(f"{key}: expected an earlier stage that makes {types}, got none")


def is_outside(source: str) -> bool:
    """Return whether an input is a path or a package, not the name of a stage."""
    scheme, colon, _ = source.partition(":")
    return "/" in source or (bool(colon) and scheme in SCHEMES) or source in (".", "..")


def _misplaced(
    full: str, key: str, valid: Sequence[str], entries: Sequence[Mapping[str, Any]], kinds: Kinds
) -> str:
    """Describe an unknown key by the stages of the recipe that have it, or the nearest known
    key.
    """
    classes = [(entry, kinds[entry["kind"]]) for entry in entries]
    keys = [
        f"{_name_of(entry)}.{key}"
        for entry, cls in classes
        if key in cls.inputs or key in (option.name for option in options_of(cls))
    ]
    if keys:
        return f"{full}: unknown key; the nearest valid one is {' or '.join(keys)}"
    return unknown_key(full, key, valid)


def _override(table: dict[str, Any], kinds: Kinds, text: str) -> None:
    """Put the value of "NAME.key=value" into the stage NAME of ``table``, or into its inputs."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"set: expected NAME.KEY=VALUE, as pretrain.max_seconds=60, got {text!r}")
    if len(text) > MAX_BYTES:
        raise InputError(f"set: expected at most {MAX_BYTES:,} characters, got {len(text):,}")
    try:
        parsed = parse_toml(f"value = {value}", "set")["value"]
    except InputError:
        parsed = value
    key = key.strip()
    *parents, last = key.split(".")
    if parents and parents[0] != INPUTS:
        # a stage's name may itself contain dots
        all_entries = _entries(table, kinds)
        entries = {n: e for e in all_entries if isinstance(n := _name_of(e), str)}
        name = max((n for n in entries if key.startswith(f"{n}.")), key=len, default=None)
        if name is None:
            raise InputError(f"set: {_misplaced(key, parents[0], [*entries], all_entries, kinds)}")
        table = entries[name]
        *parents, last = key.removeprefix(f"{name}.").split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(f"set: {parent} of {key} is not a table")
    table[last] = parsed
