"""Trainings that a run gave up for new ones: RUN/previous, previous-2 and so on, each a run folder.

Nothing is deleted. ``fastlm run RUN/previous/recipe.json --out RUN/previous`` continues one. Stages
that the new run still uses were not moved; they run again there. The move is a list of renames. The
list is written first, so that the next start finishes a move that was cut off, and no model is ever
missing from both places.
"""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlm.errors import InputError
from fastlm.files import make_folder, reason, save_atomic, write_json
from fastlm.schema import read_document

PREVIOUS = re.compile(r"previous(-\d+)?")
COMING = ".previous.new"
MOVES = ".moves.json"  # no stage may have this name


@dataclass
class _Move:
    """``names`` of the run folder move into its folder ``to``."""

    to: str
    names: list[str]


def archive(out: Path, names: Sequence[str], *, copies: Sequence[str]) -> Path:
    """Move those of ``names`` that exist in ``out``, and copies of ``copies``, into the first free
    one of ``out``/previous, previous-2, ... Return that folder. InputError: not writable.
    """
    number, to = 1, "previous"
    while os.path.lexists(out / to):
        number += 1
        to = f"previous-{number}"
    coming = make_folder(out / COMING)
    for name in copies:
        if (out / name).is_file():
            text = (out / name).read_bytes()
            save_atomic(coming / name, lambda p, text=text: p.write_bytes(text))
    write_json(coming / MOVES, {"to": to, "names": list(names)})
    finish_moving(out)
    return out / to


def finish_moving(out: Path) -> None:
    """Finish a move that was begun, wherever it was cut off; do nothing if there is none."""
    coming = out / COMING
    moves = coming / MOVES
    try:
        if moves.exists():
            move = _read(moves)
            for name in move.names:
                if os.path.lexists(out / name):
                    os.rename(out / name, coming / name)
            os.rename(coming, out / move.to)
        elif coming.exists():
            shutil.rmtree(coming)  # begun, and nothing moved yet
        for folder in out.iterdir():
            if PREVIOUS.fullmatch(folder.name) and (folder / MOVES).exists():
                (folder / MOVES).unlink()
    except OSError as error:
        where = error.filename or out
        raise InputError(f"{where}: cannot be archived: {reason(error)}") from error


def _read(moves: Path) -> _Move:
    move = read_document(moves, _Move, extra="forbid")
    if not PREVIOUS.fullmatch(move.to) or any(name != Path(name).name for name in move.names):
        raise InputError(f"{moves}: wanted a list of names of this folder, got {move.names!r:.100}")
    return move
