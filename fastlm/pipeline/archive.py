"""Trainings that a run gave up for new ones: RUN/previous, previous-2 and so on, each a run folder.

Nothing is deleted. ``fastlm run RUN/previous/recipe.json --out RUN/previous`` continues one. Stages
that the new run still uses were not moved; they run again there. The move is a list of renames. The
list is written first, so that the next start finishes a move that was cut off, and no model is ever
missing from both places.
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
class _Moves:
    """What is copied from the run folder into the one that holds this list, and what moves."""

    copies: list[RelativePath]
    names: list[RelativePath]


def archive(out: Path, names: Sequence[str], *, copies: Sequence[str]) -> Path:
    """Move those of ``names`` that exist in ``out``, and copies of ``copies``, into the first free
    one of ``out``/previous, previous-2, ... Return that folder. InputError: not writable.
    """
    folders = (out / ("previous" if n == 1 else f"previous-{n}") for n in itertools.count(1))
    folder = next(folder for folder in folders if not os.path.lexists(folder))
    write_json(folder / MOVES, {"copies": [*copies], "names": [*names]})
    finish_moving(out)
    return folder


def finish_moving(out: Path) -> None:
    """Finish a move that was begun, wherever it was cut off; do nothing if there is none."""
    try:
        for folder in out.iterdir():
            if not PREVIOUS.fullmatch(folder.name) or not (folder / MOVES).exists():
                continue
            moves = read_document(folder / MOVES, _Moves, extra="forbid")
            for name in moves.copies:
                if (out / name).is_file():
                    save_atomic(folder / name, partial(shutil.copyfile, out / name))
            for name in moves.names:
                if os.path.lexists(out / name):
                    os.rename(out / name, folder / name)
            (folder / MOVES).unlink()
    except OSError as error:
        where = error.filename or out
        raise InputError(f"{where}: cannot be archived: {reason(error)}") from error
