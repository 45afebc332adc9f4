"""Plan what a run does with each stage, and why.

A stage's fingerprint covers its options, the files they name, the version of its code and the
fingerprints of its input stages: a change affects what depends on it and nothing else. A stage is
skipped if stages.json records it with the same fingerprint and its files are still there. An
interrupted stage continues from its checkpoints, or starts again. A training also continues if only
options changed with which it can (`Stage.can_continue`). A lost training runs again together with
everything that depends on it: with a budget in seconds it need not end at the same weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.pipeline.funnel import FUNNEL
from fastlm.pipeline.provenance import json_hash
from fastlm.pipeline.recipe import SCHEMES, Kinds, Recipe, RecipeStep, is_outside
from fastlm.pipeline.record import StageRecord, changed_options, file_sizes_of
from fastlm.pipeline.run_folder import locate_model
from fastlm.pipeline.stage import Stage, is_address, options_of
from fastlm.sources.input_digest import InputDigest


class Fingerprint(str):
    """The hash of ``parts``: everything that decides a stage's output. ``missing``: the message
    about an input that does not exist yet.
    """

    parts: list[Any]
    missing = ""


@dataclass(frozen=True)
class PlannedStage:
    """A step, and what a run does with it.

    ``action`` is "skip", "continue" or "run". A step beyond ``until`` does not run now: its
    ``action`` is "archive" if it is archived along with a training, else "later". ``stale``: its
    existing output no longer fits. ``training``: that output is a training.
    """

    step: RecipeStep
    fingerprint: str
    action: str
    reason: str
    stale: bool = False
    training: bool = False


def make_plan(
    recipe: Recipe,
    names: Sequence[str],
    prints: Mapping[str, Fingerprint],
    record: Mapping[str, StageRecord],
    out: Path,
) -> list[PlannedStage]:
    """Plan the stages ``names`` of a recipe, and those after them that have become stale."""
    plan: list[PlannedStage] = []
    rerun: set[str] = set()  # the output of these differs from before
    for step in recipe.steps:
        name, done = step.name, record.get(step.name)
        action, reason = _state(step, prints[name], done, out / name)
        reason = prints[name].missing or reason
        stale = False
        if done is not None and any(map(rerun.intersection, step.inputs.values())):
            stale = True
            if action != "run":
                action, reason = "run", "an input runs again"
        elif done is not None:
            lost = action == "run" and bool(step.stage.checkpoints)
            stale = (done.fingerprint != prints[name] and action != "continue") or lost
        if stale:
            rerun.add(name)
        training = stale and _holds_training(out / name, step.stage, done, recipe.kinds)
        if name in names or stale:
            action = action if name in names else "later"
            plan.append(PlannedStage(step, str(prints[name]), action, reason, stale, training))
    if any(planned.training for planned in plan):
        plan = [replace(p, action="archive") if p.action == "later" else p for p in plan]
    return plan


def _state(
    step: RecipeStep, now: Fingerprint, done: StageRecord | None, folder: Path
) -> tuple[str, str]:
    """Return what to do with a step by itself, and why."""
    if done is None:
        return "run", "new"
    resumable = _holds_any(folder, step.stage.checkpoints)
    if done.fingerprint != now:
        changed = _changed(step, done)
        # the record's options with everything else as it is now
        kind, version, _, *rest = now.parts
        options_only = done.fingerprint == json_hash([kind, version, done.options, *rest])
        resumable = (
            resumable
            and options_only
            and step.stage.can_continue(changed, folder, done.file_sizes is not None)
        )
        reason = _change(step, done, changed)
    elif done.file_sizes is None:
        resumable = resumable or _holds_any(folder, step.stage.resumable)
        reason = "was interrupted"
    else:
        sizes = file_sizes_of(folder, step.stage.checkpoints)
        lost = [name for name, size in done.file_sizes.items() if sizes.get(name) != size]
        if not lost:
            return "skip", "done"
        reason = f"{lost[0]} is missing or changed"
    return ("continue" if resumable else "run"), reason


def _changed(step: RecipeStep, done: StageRecord) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ -> their values before and now."""
    defaults = {option.name: option.default for option in options_of(type(step.stage))}
    before, now = defaults | done.options, defaults | changed_options(step.stage)
    pairs = {key: (before.get(key), now.get(key)) for key in now | before}
    return {key: (was, value) for key, (was, value) in pairs.items() if was != value}


def _change(step: RecipeStep, done: StageRecord, changed: Mapping[str, tuple[Any, Any]]) -> str:
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
        return "its inputs are other stages"
    if done.version != step.stage.version:
        return f"its code has changed: version {done.version}, now {step.stage.version}"
    return "the content of an input has changed"


def _holds_training(folder: Path, stage: Stage, done: StageRecord | None, kinds: Kinds) -> bool:
    """Return whether a folder holds a model or a checkpoint of a training, by its record."""
    cls = kinds.get(done.kind, type(stage)) if done else type(stage)
    return bool(cls.checkpoints) and _holds_any(folder, (*cls.checkpoints, *cls.outputs.values()))


def _holds_any(folder: Path, names: Sequence[str]) -> bool:
    """Return whether one of these folders holds a file that is not temporary."""
    return any((folder / name).is_dir() and any((folder / name).glob("[!.]*")) for name in names)


def fingerprints(
    recipe: Recipe, input_digest: InputDigest, *, may_miss: bool = False
) -> dict[str, Fingerprint]:
    """Return the fingerprints of all stages, by name. InputError: an input from outside the run
    that does not exist, unless it ``may_miss``: in a dry run it may come later.
    """
    prints: dict[str, Fingerprint] = {}
    for step in recipe.steps:
        stage, missing = step.stage, ""
        try:
            upstream = _upstream(step, prints, input_digest)
            inputs = [stage.digest_inputs(input_digest), upstream]
        except InputError as error:
            if not may_miss:
                raise
            inputs, missing = [], str(error)
        parts = [stage.kind, stage.version, changed_options(stage), *inputs]
        prints[step.name] = Fingerprint(json_hash(parts))
        prints[step.name].parts, prints[step.name].missing = parts, missing
    return prints


def _upstream(
    step: RecipeStep, prints: Mapping[str, Fingerprint], input_digest: InputDigest
) -> dict[str, Any]:
    """Return the states of a step's inputs: fingerprints of stages, and what is outside the run."""
    upstream = {}
    for key, names in step.inputs.items():
        states = [
            _outside(step, key, name, input_digest) if is_outside(name) else prints[name]
            for name in names
        ]
        # if there may be several, the result refers to each by its name
        upstream[key] = [*zip(names, states)] if step.stage.inputs[key].several else states
    return upstream


def _outside(step: RecipeStep, key: str, name: str, input_digest: InputDigest) -> Any:
    """Return the state of an input from outside the run: the content of local files, the name of a
    package, the address of a server.
    """
    path, spec = Path(name), step.stage.inputs[key]
    types = spec.types
    try:
        if spec.addresses and is_address(name):
            return name
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
