"""Archive trainings that a run replaces: RUN/previous, previous-2 and so on, each a run folder.

Nothing is deleted. ``fastlm run RUN/previous/recipe.json --out RUN/previous`` continues one. Stages
that the new run still uses stay where they are; the archived run computes them again. The move is a
list of renames. The list is written first, so that the next start finishes an interrupted move. No
model is ever missing from both folders.
"""

import itertools
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastlm.errors import InputError
from fastlm.files import reason, save_atomic, write_json
from fastlm.schema import RelativePath, read_document

PREVIOUS = re.compile(r"previous(-\d+)?")
MOVES = ".moves.json"  # no stage may have this name


@dataclass
class _PendingMoves:
    """The files to copy from the run folder into the folder of this list, and the names to move."""

    copies: list[RelativePath]
    names: list[RelativePath]


def archive(out: Path, names: Sequence[str], *, copies: Sequence[str]) -> Path:
    """Move those of ``names`` that exist in ``out``, and copy ``copies``, into the first free
    folder of ``out``/previous, previous-2, ... Return that folder. InputError: not writable.
    """
    folders = (out / ("previous" if n == 1 else f"previous-{n}") for n in itertools.count(1))
    folder = next(folder for folder in folders if not os.path.lexists(folder))
    write_json(folder / MOVES, {"copies": [*copies], "names": [*names]})
    finish_moving(out)
    return folder


def finish_moving(out: Path) -> None:
    """Finish an interrupted move, wherever it stopped. Do nothing if there is none."""
    try:
        for folder in out.iterdir():
            if not PREVIOUS.fullmatch(folder.name) or not (folder / MOVES).exists():
                continue
            moves = read_document(folder / MOVES, _PendingMoves, extra="forbid")
            for name in moves.copies:
                if (out / name).is_file():
                    save_atomic(folder / name, partial(shutil.copyfile, out / name))
            for name in moves.names:
                if os.path.lexists(out / name):
                    os.rename(out / name, folder / name)
            (folder / MOVES).unlink()
    except OSError as error:
        path = error.filename or out
        raise InputError(f"{path}: cannot be archived: {reason(error)}") from error
