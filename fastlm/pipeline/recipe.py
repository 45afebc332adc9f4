"""Recipes: a whole run as one TOML file, a list of stages.

    name = "mine"
    seed = 1

    [[stage]]
    kind = "data"
    sources = ["docs/"]

    [[stage]]
    name = "small"                   # default: the kind
    kind = "pretrain"
    from = "shards"                  # default: the last stage that made what this one needs

What comes from outside the run may have a name, too, so that one --set changes it everywhere:

    [inputs]
    old = "runs/chat/ppo"

The other keys of a stage are the fields of its class (`fastlm.stages`): a recipe has no names
of its own. An unknown key is refused and the nearest known one named; a wrong type is refused and
both types are named. Composition in the style of Hydra or YAML was left out: a run is read from top
to bottom in one file.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import InputError, unknown_key
from fastlm.files import read_json
from fastlm.pipeline.stage import Facts, Stage, Takes, options_of
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
class Step:
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
    steps: tuple[Step, ...]
    table: Mapping[str, Any]  # as it was read, with overrides
    kinds: Kinds  # all that a recipe may have

    def step(self, name: str) -> Step | None:
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
    try:
        # recipe.json of a run folder is a recipe too
        table = read_json(path) if path.suffix == ".json" else read_toml(path, MAX_BYTES)[0]
    except InputError as e:
        raise InputError(f"recipe {e}") from None
    try:
        if path.suffix != ".json":
            _resolve_settings(table, kinds, path.parent)
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
            raise InputError(f"{key}: wanted {types[KEYS[key]]}, got {value!r:.80}")
    name, seed = table.get("name"), table.get("seed", 0)
    if name is None:
        raise InputError("name: wanted, is missing")
    if not _NAME.fullmatch(name):
        raise InputError(f"name: wanted the name of a folder below runs/, got {name!r}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: wanted 0 or more and less than 2^63, got {seed}")
    if not entries:
        raise InputError("stage: wanted at least one [[stage]], got none")
    outside = _outside(table.get(INPUTS, {}), entries)
    steps: dict[str, Step] = {}
    facts: dict[str, Facts] = {}
    for entry in entries:
        step = _step(entry, steps, entries, seed, outside, kinds)
        try:
            step.stage.check()
            known = {
                k: [facts.get(v, {"name": v}) for v in names] for k, names in step.inputs.items()
            }
            # all of it before the first stage runs: the last one runs after the training
            facts[step.name] = {**step.stage.plan(known), "name": step.name}
        except InputError as e:
            raise InputError(f"{step.name}.{e}") from None
        steps[step.name] = step
    taken = {
        source for step in steps.values() for given in step.inputs.values() for source in given
    }
    if unused := [name for name, path in outside.items() if path not in taken]:
        raise InputError(
            f"{INPUTS}.{unused[0]}: wanted a stage that has it as an input, got none (options, such"
            " as a list of data files, and --set of a stage's input take paths)"
        )
    description = table.get("description", "")
    return Recipe(name, description, seed, tuple(steps.values()), table, kinds)


def _entries(table: Mapping[str, Any], kinds: Kinds) -> list[dict[str, Any]]:
    entries = table.get("stage", [])
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        raise InputError("stage: wanted a list of tables, [[stage]]")
    for number, entry in enumerate(entries, 1):
        kind = entry.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            near = difflib.get_close_matches(str(kind)[:80], kinds, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"stage {number}.kind: wanted one of {', '.join(kinds)}, got {kind!r:.80}{hint}"
            )
    return entries


def _outside(named: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Check what a recipe names from outside the run: name -> path."""
    for name, path in named.items():
        if not isinstance(path, str) or not is_outside(path):
            raise InputError(f"{INPUTS}.{name}: wanted a path with a /, got {path!r:.80}")
        if is_outside(name) or name in map(_name_of, entries):
            raise InputError(f"{INPUTS}.{name}: wanted a name that is no stage's and no path's")
    return dict(named)


def _name_of(entry: Mapping[str, Any]) -> Any:
    return entry.get("name", entry["kind"])


def _step(
    entry: Mapping[str, Any],
    before: Mapping[str, Step],
    entries: Sequence[Mapping[str, Any]],
    seed: int,
    outside: Mapping[str, str],
    kinds: Kinds,
) -> Step:
    """Return the step of one ``[[stage]]``, with its inputs among the steps ``before`` and those
    from ``outside``."""
    name, cls = _name_of(entry), kinds[entry["kind"]]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or RESERVED.fullmatch(name):
        raise InputError(
            f"stage.name: wanted the name of a folder that no run or recipe has, got {name!r:.80}"
        )
    if name in before:
        raise InputError(f"stage.name: {name!r} stands twice; give each its own name")
    options = {option.name: option for option in options_of(cls)}
    main = next(iter(cls.reads), None)
    alias = {"from", "of"} if main else set()
    given = {k: v for k, v in entry.items() if k not in ("kind", "name")}
    edges: dict[str, tuple[str, Any]] = {}  # input -> the key that the recipe used, its value
    for key in list(given):
        if key in alias or key in cls.reads:
            target = main if main and key in alias else key
            if target in edges:
                raise InputError(f"{name}.{key}: says once more what {target!r} is")
            edges[target] = (key, given.pop(key))
        elif key not in options:
            raise InputError(
                _misplaced(f"{name}.{key}", key, [*options, *cls.reads, *alias], entries, kinds)
            )
    if "seed" in options:
        given.setdefault("seed", seed)
    stage = validate(given, cls, f"{name}.", extra="forbid")
    inputs = {
        key: _sources(name, edges[key], takes, before, entries, outside)
        if key in edges
        else _last_that_fits(name, key, takes, before)
        for key, takes in cls.reads.items()
    }
    return Step(name, stage, inputs)


def _sources(
    name: str,
    edge: tuple[str, Any],
    takes: Takes,
    before: Mapping[str, Step],
    entries: Sequence[Mapping[str, Any]],
    outside: Mapping[str, str],
) -> tuple[str, ...]:
    """Check what a recipe names as one input of a stage; return stages and paths."""
    key, value = edge
    values = value if isinstance(value, list) else [value]
    if not values and takes.optional:
        return ()
    if not values or not all(isinstance(v, str) and v for v in values):
        raise InputError(f"{name}.{key}: wanted the name of a stage or a path, got {value!r:.80}")
    if len(values) > 1 and not takes.several:
        raise InputError(f"{name}.{key}: wanted one, got {len(values)}")
    values = [outside.get(v, v) for v in values]
    if len({*values}) < len(values):
        raise InputError(f"{name}.{key}: wanted each once, got {', '.join(values):.80}")
    for v in values:
        if is_outside(v):
            continue
        if v not in before:
            later = [_name_of(e) for e in entries]
            if v in later:
                raise InputError(f"{name}.{key}: wanted a stage above it, {v!r} stands below")
            near = difflib.get_close_matches(v[:80], [*before, *outside], n=1, cutoff=0.0)
            hint = f"; the nearest one is {near[0]!r}" if near else ""
            raise InputError(
                f"{name}.{key}: wanted the name of a stage above it or a path with a /,"
                f" got {v!r:.80}{hint}"
            )
        leaves = before[v].stage.leaves
        if not any(kind in leaves for kind in takes.types):
            raise InputError(
                f"{name}.{key}: wanted a stage that makes {' or '.join(takes.types)}; {v!r} makes"
                f" {' and '.join(leaves)}"
            )
    return tuple(values)


def is_outside(source: str) -> bool:
    """Return whether an input is a path or a package, not the name of a stage."""
    scheme, colon, _ = source.partition(":")
    return "/" in source or (bool(colon) and scheme in SCHEMES) or source in (".", "..")


def _last_that_fits(
    name: str, key: str, takes: Takes, before: Mapping[str, Step]
) -> tuple[str, ...]:
    for kind in takes.types if takes.default else ():
        made = [step.name for step in before.values() if kind in step.stage.leaves]
        if made:
            return (made[-1],)
    if takes.optional:
        return ()
    raise InputError(
        f"{name}.{key}: wanted a stage above it that makes {' or '.join(takes.types)}, got none"
    )


def _misplaced(
    full: str,
    key: str,
    known: Sequence[str],
    entries: Sequence[Mapping[str, Any]],
    kinds: Kinds,
) -> str:
    """Describe an unknown key by the stages of the recipe that have it, or the nearest
    known key.
    """
    found = [
        f"{_name_of(e)}.{key}"
        for e in entries
        if key in {o.name for o in options_of(kinds[e["kind"]])} | set(kinds[e["kind"]].reads)
    ]
    if found:
        return f"{full}: unknown key; the nearest known one is {' or '.join(found)}"
    return unknown_key(full, key, known)


def _resolve_settings(table: Mapping[str, Any], kinds: Kinds, folder: Path) -> None:
    """Replace the names of files of settings by their paths below the recipe's folder."""
    for entry in _entries(table, kinds):
        for key in kinds[entry["kind"]].settings_in:
            if isinstance(name := entry.get(key), str) and name:
                entry[key] = str(folder / name)


def _override(table: dict[str, Any], kinds: Kinds, text: str) -> None:
    """Put the value of "NAME.key=value" into the stage NAME of ``table``, or into its inputs."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"set: wanted NAME.KEY=VALUE, as pretrain.max_seconds=60, got {text!r}")
    if len(text) > MAX_BYTES:
        raise InputError(f"set: wanted at most {MAX_BYTES:,} characters, got {len(text):,}")
    try:
        parsed = parse_toml(f"value = {value}", "set")["value"]
    except InputError:
        parsed = value
    *parents, last = key.strip().split(".")
    if parents and parents[0] != INPUTS:
        # a stage's name may itself contain dots
        found = _entries(table, kinds)
        entries = {n: e for e in found if isinstance(n := _name_of(e), str)}
        names = [n for n in entries if key.strip().startswith(f"{n}.")]
        if not names:
            raise InputError(
                f"set: {_misplaced(key.strip(), parents[0], [*entries], found, kinds)}"
            )
        name = max(names, key=len)
        table = entries[name]
        *parents, last = key.strip().removeprefix(f"{name}.").split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(f"set: {parent} of {key} is no table")
    table[last] = parsed
