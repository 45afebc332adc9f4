"""What a run will do with each stage, and why.

A stage's fingerprint covers its options, the files they name, the version of its code and the
fingerprints of its input stages: a change affects what depends on it and nothing else. A stage is
skipped if stages.json records it with the same fingerprint and its files are still there. An
interrupted stage continues from what it holds, or starts again. A training also continues if all
that has changed is options with which it can (`Stage.can_continue`). A training that is lost runs
again together with everything that depends on it: it need not end at the same weights if its budget
is in seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.pipeline.funnel import FUNNEL
from fastlm.pipeline.provenance import json_hash
from fastlm.pipeline.recipe import SCHEMES, Kinds, Recipe, Step, is_outside
from fastlm.pipeline.record import Entry, chosen, sizes_of
from fastlm.pipeline.run_folder import locate_model
from fastlm.pipeline.stage import Stage, options_of
from fastlm.sources.input_digest import InputDigest


class Fingerprint(str):
    """The hash of ``parts``: everything that decides a stage's output."""

    parts: list[Any]


@dataclass(frozen=True)
class Planned:
    """A step, and what a run does with it.

    ``do`` is "skip", "continue" or "run". A step beyond ``until`` does not run now: its ``do`` is
    "archive" if it is archived along with a training, else "later". ``stale``: its existing output
    no longer fits. ``training``: that output is a training.
    """

    step: Step
    fingerprint: str
    do: str
    why: str
    stale: bool = False
    training: bool = False


def make_plan(
    recipe: Recipe,
    wanted: Sequence[str],
    prints: Mapping[str, Fingerprint],
    record: Mapping[str, Entry],
    out: Path,
) -> list[Planned]:
    """Plan the stages ``wanted`` of a recipe, and those after them that have become stale."""
    plan: list[Planned] = []
    again: set[str] = set()  # the output of these differs from before
    for step in recipe.steps:
        name, done = step.name, record.get(step.name)
        do, why = _state(step, prints[name], done, out / name)
        stale = False
        if done is not None and any(map(again.intersection, step.inputs.values())):
            stale = True
            if do != "run":
                do, why = "run", "what it takes from runs again"
        elif done is not None:
            lost = do == "run" and bool(step.stage.checkpoints)
            stale = (done.fingerprint != prints[name] and do != "continue") or lost
        if stale:
            again.add(name)
        training = stale and _holds_training(out / name, step.stage, done, recipe.kinds)
        if name in wanted or stale:
            do = do if name in wanted else "later"
            plan.append(Planned(step, str(prints[name]), do, why, stale, training))
    if any(planned.training for planned in plan):
        plan = [replace(p, do="archive") if p.do == "later" else p for p in plan]
    return plan


def _state(step: Step, now: Fingerprint, done: Entry | None, folder: Path) -> tuple[str, str]:
    """Return what to do with a step by itself, and why."""
    if done is None:
        return "run", "new"
    held = _holds_any(folder, step.stage.checkpoints)
    if done.fingerprint != now:
        changed = _changed(step, done)
        # the record's options with everything else as it is now
        kind, version, _, *rest = now.parts
        alone = done.fingerprint == json_hash([kind, version, done.options, *rest])
        held = (
            held and alone and step.stage.can_continue(changed, folder, done.file_sizes is not None)
        )
        why = _change(step, done, changed)
    elif done.file_sizes is None:
        held = held or _holds_any(folder, step.stage.resumable)
        why = "was cut off"
    else:
        sizes = sizes_of(folder, step.stage.checkpoints)
        lost = [name for name, size in done.file_sizes.items() if sizes.get(name) != size]
        if not lost:
            return "skip", "done"
        why = f"{lost[0]} is missing or changed"
    return ("continue" if held else "run"), why


def _changed(step: Step, done: Entry) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ -> their values before and now."""
    defaults = {option.name: option.default for option in options_of(type(step.stage))}
    before, now = defaults | done.options, defaults | chosen(step.stage)
    pairs = {key: (before.get(key), now.get(key)) for key in now | before}
    return {key: (was, value) for key, (was, value) in pairs.items() if was != value}


def _change(step: Step, done: Entry, changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Describe to the user what is new: the first option that differs, else the inputs, else the
    stage's code.
    """
    if done.kind != step.stage.kind:
        return f"was {done.kind}"
    for key, (was, now) in changed.items():
        if key not in (options := asdict(step.stage)):
            return f"{key} was {was!r:.40}"
        # an option that decided nothing is not recorded: the stage has its value, or nobody
        now = now if key in step.stage.identity() else options[key]
        if key in done.options or key in replace(step.stage, **{key: was}).identity():
            return f"{key} was {was!r:.40}, now {now!r:.40}"
        return f"{key} is now {now!r:.40}"
    if {k: list(v) for k, v in step.inputs.items()} != done.inputs:
        return "takes from other stages"
    if done.version != step.stage.version:
        return f"its code has changed: version {done.version}, now {step.stage.version}"
    return "what it reads has changed"


def _holds_training(folder: Path, stage: Stage, done: Entry | None, kinds: Kinds) -> bool:
    """Return whether a folder holds a model or a checkpoint of a training, by its record."""
    made = kinds.get(done.kind, type(stage)) if done else type(stage)
    return bool(made.checkpoints) and _holds_any(
        folder, (*made.checkpoints, *made.outputs.values())
    )


def _holds_any(folder: Path, names: Sequence[str]) -> bool:
    """Return whether one of these folders holds something but what was being written."""
    return any((folder / name).is_dir() and any((folder / name).glob("[!.]*")) for name in names)


def fingerprints(recipe: Recipe, input_digest: InputDigest) -> dict[str, Fingerprint]:
    """Return the fingerprints of all stages, by name. InputError: an input from outside the run
    that does not exist.
    """
    prints: dict[str, Fingerprint] = {}
    for step in recipe.steps:
        stage, upstream = step.stage, {}
        for key, names in step.inputs.items():
            states = [
                _outside(step, key, name, input_digest) if is_outside(name) else prints[name]
                for name in names
            ]
            # if there may be several, the result refers to each by its name
            upstream[key] = [*zip(names, states)] if stage.inputs[key].several else states
        parts = [
            stage.kind,
            stage.version,
            chosen(stage),
            stage.digest_inputs(input_digest),
            upstream,
        ]
        prints[step.name] = Fingerprint(json_hash(parts))
        prints[step.name].parts = parts
    return prints


def _outside(step: Step, key: str, name: str, input_digest: InputDigest) -> Any:
    """Return the state of an input from outside the run: the content of local files, the name of a
    package.
    """
    path, types = Path(name), step.stage.inputs[key].types
    try:
        if not path.exists() and name.partition(":")[0] in SCHEMES:
            return name  # the name of a package
        if {"model", "reward", "quantized"} & set(types):
            files = input_digest.hash_tree(locate_model(path))
            return [file for file in files if file[0] != "README.md"]  # a card changes no model
        if "corpus" in types and not (path / FUNNEL).is_file():
            return input_digest.hash_sources([name])
        if not path.exists():
            raise InputError(f"{name}: expected a path that exists")
        return input_digest.hash_tree(path)
    except InputError as error:
        raise InputError(f"{step.name}.{key}: {error}") from None
