"""Publish a complete build: move its parts into the corpus. A crash at any moment is repaired.

`arrange` links the parts into ``work/parts`` and writes `PUBLISHING`, from then on the build is
complete. `publish` takes the funnel of an earlier corpus away first and writes the new one last, so
a mix of both never looks finished. Killed in between, it is completed by the next call.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm.data.corpus import (
    CARD_FILES,
    PLAN,
    REMOVED,
    SPLITS,
    SUFFIX,
    UNITS,
    is_corpus,
    is_part_name,
    part_name,
    read_units,
)
from fastlm.data.unit_files import REMOVED as REMOVED_ROWS
from fastlm.data.unit_files import link, outputs_of
from fastlm.errors import InputError
from fastlm.files import json_text, remove, save_atomic, sync, write_json
from fastlm.pipeline.funnel import FUNNEL, Funnel
from fastlm.pipeline.units import (
    BuildError,
    Work,
    file_sha256,
    read_state,
    write_durably,
)
from fastlm.sources.remote import (
    StoreError,
    copy_objects,
    delete_objects,
    is_file,
    list_sizes,
    write_object,
)

PUBLISHING = "publishing.json"  # funnel and parts of a complete build, which are being moved
# folder of the corpus, the step that wrote its parts, their name there
PARTS = (
    ("train", "write", f"train{SUFFIX}"), ("heldout", "write", f"heldout{SUFFIX}"),
    (REMOVED, "apply", REMOVED_ROWS),
)  # fmt: skip


def has_arranged(work: Work) -> bool:
    """Return True if the build of this plan is complete, and its parts are being moved."""
    path = work.folder / PUBLISHING
    return is_file(path) and read_state(path).get("plan") == work.digest


def find_finished(out: Path, plan: Mapping[str, Any]) -> Funnel | None:
    """Return the funnel of the corpus in ``out`` if it has this plan and all its parts. The plan
    may be of another day.
    """
    try:
        work = Work(out)
        if {**work.plan, "date": plan["date"]} != plan:
            return None
        if work.is_remote:  # what is there is complete
            records = {record["part"] for record in read_units(out)}
            return Funnel.load(out) if records <= list_sizes(out).keys() else None
        for record in read_units(out):
            if file_sha256(out / record["part"]) != record["sha256"]:
                return None
        return Funnel.load(out)
    except StoreError:
        raise
    except (InputError, OSError):
        return None


def check_folder(out: Path) -> None:
    """Check that ``out`` has nothing that publishing would replace, except another corpus.
    InputError: names it.
    """
    for name in (*SPLITS, REMOVED):
        if (folder := out / name).is_dir():
            for path in folder.iterdir():
                if not is_part_name(path.name) and not path.name.startswith("."):
                    raise InputError(
                        f"{folder}: expected parts of a corpus, got {path.name}: write to another"
                        " folder"
                    )
        elif os.path.lexists(folder):
            raise InputError(f"{folder}: expected a folder, or none, got something else")
    for name in (*(f"{split}{SUFFIX}" for split in SPLITS), PLAN, UNITS):
        is_other = name in (PLAN, UNITS) and (out / REMOVED).is_dir()  # killed while publishing
        if os.path.lexists(out / name) and not is_corpus(out) and not is_other:
            raise InputError(
                f"{out / name}: expected no file of that name beside a new corpus: write to another"
                " folder, or delete it"
            )


def arrange(work: Work, funnel: Funnel) -> None:
    """Write `PUBLISHING`; link the files of the last steps into ``work/parts``, as they will be in
    the corpus.
    """
    parts = work.folder / "parts"
    if not work.is_remote:
        remove(parts)
    records = []
    for folder, step, name in PARTS:
        if not work.is_remote:
            (parts / folder).mkdir(parents=True)
        for unit in outputs_of(work):
            marker = work.marker(step, unit)
            if marker is None:
                raise BuildError(
                    f"{work.folder}: expected unit {unit} of the step {step!r}, it is missing"
                )
            if name not in marker["files"]:
                continue
            part = f"{folder}/{part_name(unit)}"
            if not work.is_remote:
                link(work.path(step, unit, name), parts / part)
                sync(parts / part)
            if folder in SPLITS:
                remaining = marker["counts"]["remaining"]
                records.append({
                    "part": part, "documents": remaining[f"{folder} documents"],
                    "bytes": remaining[f"{folder} bytes"],
                    "sha256": marker["files"][name]["sha256"],
                })  # fmt: skip
        if not work.is_remote:
            sync(parts / folder)
    state = {"plan": work.digest, "funnel": vars(funnel), "units": records}
    write_durably(work.folder / PUBLISHING, state)


def publish(work: Work, out: Path) -> Funnel:
    """Move the parts of a complete build to their place; the funnel is written last.

    Killed in between, it is completed by the next call. Until it begins, an earlier corpus in
    ``out`` is untouched.
    """
    path = work.folder / PUBLISHING
    state = read_state(path)
    if work.is_remote:
        return _publish_objects(work, out, state)
    (out / FUNNEL).unlink(missing_ok=True)  # a mix of old and new files does not look finished
    for name in CARD_FILES:  # of an earlier corpus
        (out / name).unlink(missing_ok=True)
    before = work.folder / "replaced"
    before.mkdir(exist_ok=True)
    for name in (*SPLITS, REMOVED):
        source, target = work.folder / "parts" / name, out / name
        if source.is_dir():
            if os.path.lexists(target):
                remove(before / name)
                os.rename(target, before / name)
            os.rename(source, target)
        (out / f"{name}{SUFFIX}").unlink(missing_ok=True)  # of an older version
    for record in state["units"]:
        if not (out / record["part"]).is_file():
            raise BuildError(f"{out / record['part']}: expected a part of the build, it is missing")
    try:
        save_atomic(out / PLAN, lambda part: shutil.copyfile(work.folder / PLAN, part))
        write_json(out / UNITS, state["units"])
        write_json(out / FUNNEL, state["funnel"])
    except InputError as error:
        raise BuildError(str(error)) from error
    path.unlink()
    work.delete()
    return Funnel.load(out)


def _publish_objects(work: Work, out: Path, state: Mapping[str, Any]) -> Funnel:
    """Copy the parts of a complete build to their names; object storage cannot rename."""
    delete_objects([out / name for name in (FUNNEL, *CARD_FILES)])
    parts = []
    for folder, step, name in PARTS:
        for unit in outputs_of(work):
            if name in (work.marker(step, unit) or {"files": ()})["files"]:
                parts.append((work.stored(step, unit, name), out / folder / part_name(unit)))
    copy_objects(parts)
    folders = (*SPLITS, REMOVED)
    earlier = {out / folder / name for folder in folders for name in list_sizes(out / folder)}
    earlier |= {out / f"{folder}{SUFFIX}" for folder in folders}
    delete_objects(sorted(earlier - {target for _, target in parts}))
    copy_objects([(work.folder / PLAN, out / PLAN)])
    write_object(out / UNITS, json_text(state["units"]).encode())
    write_object(out / FUNNEL, json_text(state["funnel"]).encode())
    work.delete()
    return Funnel.load(out)
