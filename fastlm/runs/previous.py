"""The training that a run gave up for a new one: RUN/previous/, one generation, a run folder too.

``fastlm run RECIPE --out RUN/previous`` with the old recipe goes on with it: what lies beside it
there is its recipe and its record; data and shards that are not, since the new run goes on using
them, are made again. The move is a list of renames: the list is written first, so that a move that
was cut off is finished by the next start, and at no moment is a model in neither place.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fastlm.errors import InputError
from fastlm.files import make_folder, parse_json, read_text, reason, save_atomic

PREVIOUS = "previous"
COMING, GOING = ".previous.new", ".previous.old"
MOVES = "moves.json"


def set_aside(out: Path, names: Sequence[str], *, copies: Sequence[str]) -> Path:
    """Moves ``names`` of ``out``, as far as they exist, and copies of ``copies`` to
    ``out``/previous, in place of what was there. InputError: not writable, or what is there has
    none of ``copies``: it is somebody's own.
    """
    previous = out / PREVIOUS
    if previous.exists() and not any((previous / name).exists() for name in copies):
        raise InputError(
            f"{previous}: wanted the name for the training that is set aside, it is taken;"
            " rename that folder"
        )
    coming = make_folder(out / COMING)
    for name in copies:
        if (out / name).is_file():
            text = (out / name).read_bytes()
            save_atomic(coming / name, lambda p, text=text: p.write_bytes(text))
    save_atomic(coming / MOVES, lambda p: p.write_text(json.dumps(list(names)), "utf-8"))
    finish_moving(out)
    return previous


def finish_moving(out: Path) -> None:
    """Ends a move that was begun, whenever it was cut off; without one does nothing."""
    coming, previous, going = out / COMING, out / PREVIOUS, out / GOING
    moves = coming / MOVES
    try:
        if moves.exists():
            for name in _names(moves):
                if (out / name).exists():
                    os.rename(out / name, coming / name)
            if previous.exists():
                _remove(going)
                os.rename(previous, going)
            os.rename(coming, previous)
        _remove(coming)  # begun, and nothing moved yet
        _remove(going)
        (previous / MOVES).unlink(missing_ok=True)
    except OSError as error:
        where = error.filename or out
        raise InputError(f"{where}: cannot be set aside: {reason(error)}") from error


def _names(moves: Path) -> list[str]:
    names = parse_json(read_text(moves), moves)
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name == Path(name).name for name in names
    ):
        raise InputError(f"{moves}: wanted a list of names of this folder, got {names!r:.100}")
    return names


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
