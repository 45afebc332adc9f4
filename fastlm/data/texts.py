"""The text, or the tokens, of whatever a path names: prepared text, shards, or plain text."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastlm.data.extract import extract
from fastlm.data.prepare import HELDOUT, TRAIN, read_documents
from fastlm.errors import InputError
from fastlm.pipeline.funnel import FUNNEL
from fastlm.sources.packages import default_cache
from fastlm.sources.rows import ignore_message, read_source

if TYPE_CHECKING:
    from fastlm.data.shards import TokenDataset
    from fastlm.tokenizer.tokenizer import Tokenizer

# Default limit: a longer context changes bits per byte little and costs much
LONGEST_WINDOW = 1024


def has_parts(data: str | Path) -> bool:
    """Whether ``data`` has a training and a held-out part: prepared text, or shards of both."""
    from fastlm.data.shards import INDEX

    data = Path(data)
    shards = all((data / part / INDEX).is_file() for part in ("train", "heldout"))
    return shards or (data / FUNNEL).is_file()


def read_texts(
    source: str | Path,
    *,
    part: str = "heldout",
    cache: Path | None = None,
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[str]:
    """Yield the texts of a source that ``fastlm data prepare`` accepts, or of what it prepared.

    Args:
        source: a prepared folder, a ``.jsonl.zst`` file of documents, or a source.
        cache: where packages are kept.
        part: "train" or "heldout": the part of a prepared folder.
        on_skip: receives the reason why a file or a line is skipped.
    """
    yield from (text for text, _ in _read_sourced(source, part, cache, on_skip))


def _read_sourced(
    source: str | Path, part: str, cache: Path | None, on_skip: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """The texts of `read_texts`, each with the source that its document names."""
    if (Path(source) / FUNNEL).is_file():
        source = Path(source) / {"train": TRAIN, "heldout": HELDOUT}[part]
    if str(source).endswith(".jsonl.zst"):
        yield from ((document.text, document.source) for document in read_documents(Path(source)))
    else:
        documents = read_source(str(source), cache=cache or default_cache(), on_skip=on_skip)
        yield from ((text, d.source) for d in documents if (text := extract(d)))


def check_window(context: int, seq_len: int | None, stride: int | None) -> tuple[int, int]:
    """Return the window and stride: by default the context up to `LONGEST_WINDOW`, half
    the window.
    """
    window = seq_len or min(context, LONGEST_WINDOW)
    if stride is not None and stride > window:
        raise InputError(f"stride: expected at most the window of {window} tokens, got {stride}")
    return window, stride or max(1, window // 2)


@contextmanager
def token_dataset(
    data: str | Path,
    tokenizer: "Tokenizer",
    vocab_size: int,
    *,
    part: str = "heldout",
    cache: Path | None = None,
    on_skip: Callable[[str], None] = ignore_message,
    keep: list[tuple[str, str]] | None = None,
    name: str = "data",
) -> Iterator["TokenDataset"]:
    """Context: the tokens of the text or shards at ``data``.

    Args:
        vocab_size: of the model; shards of a larger one, or of another tokenizer, are refused.
        part: "train" or "heldout", of prepared text or shards that have both.
        keep: gets the texts with their sources, if it is text.
        name: of the argument, for messages.
    """
    from fastlm.data.shards import INDEX, TokenDataset, write_shards

    data = Path(data)
    if (data / part / INDEX).is_file():
        data = data / part
    if (data / INDEX).is_file():
        dataset = TokenDataset(data)
        if dataset.vocab_size > vocab_size:
            raise InputError(
                f"{name}: expected tokens of a vocabulary of at most {vocab_size},"
                f" got {dataset.vocab_size}"
            )
        dataset.check_tokenizer(tokenizer, name)
        yield dataset
        return
    texts = [] if keep is None else keep
    texts += _read_sourced(data, part, cache, on_skip)
    if not texts:
        raise InputError(f"{name} {data}: expected text, got none")
    with tempfile.TemporaryDirectory() as folder:
        write_shards((text for text, _ in texts), tokenizer, Path(folder))
        yield TokenDataset(folder)
