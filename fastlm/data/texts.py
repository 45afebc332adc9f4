"""Read the text, or the tokens, at a path: prepared text, shards, or plain text."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastlm.data.corpus import is_corpus, is_split, read_documents
from fastlm.data.extract import extract
from fastlm.errors import InputError
from fastlm.sources.packages import default_cache
from fastlm.sources.source_files import ignore_message, read_source

if TYPE_CHECKING:
    from fastlm.data.shards import TokenDataset
    from fastlm.tokenizer.tokenizer import Tokenizer

# Default limit: a longer context changes bits per byte little and costs much
MAX_WINDOW = 1024


def has_splits(data: str | Path) -> bool:
    """Return True if ``data`` (prepared text or shards) has a training and a held-out split."""
    from fastlm.data.shards import INDEX

    data = Path(data)
    shards = all((data / split / INDEX).is_file() for split in ("train", "heldout"))
    return shards or is_corpus(data)


def read_texts(
    source: str | Path,
    *,
    split: str = "heldout",
    cache: Path | None = None,
    on_skip: Callable[[str], None] = ignore_message,
) -> Iterator[str]:
    """Yield the texts of a source that ``fastlm data prepare`` accepts, or of what it prepared.

    Args:
        source: a prepared folder, a split of it (``OUT/train``), a ``.jsonl.zst`` file of
            documents, or a source.
        cache: the folder of downloaded packages.
        split: "train" or "heldout", of a prepared folder.
        on_skip: receives the reason why a file or a line is skipped.
    """
    yield from (text for text, _ in _read_texts_with_sources(source, split, cache, on_skip))


def _read_texts_with_sources(
    source: str | Path, split: str, cache: Path | None, on_skip: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """Yield the texts of `read_texts`, each with its document's source."""
    if is_corpus(source) or is_split(source):
        yield from ((document.text, document.source) for document in read_documents(source, split))
    else:
        documents = read_source(str(source), cache=cache or default_cache(), on_skip=on_skip)
        yield from ((text, d.source) for d in documents if (text := extract(d)))


def check_window(context: int, seq_len: int | None, stride: int | None) -> tuple[int, int]:
    """Return (window, stride). The default window is the context, at most `MAX_WINDOW`; the
    default stride is half the window.
    """
    window = seq_len or min(context, MAX_WINDOW)
    if stride is not None and stride > window:
        raise InputError(f"stride: expected at most the window of {window} tokens, got {stride}")
    return window, stride or max(1, window // 2)


@contextmanager
def token_dataset(
    data: str | Path,
    tokenizer: "Tokenizer",
    vocab_size: int,
    *,
    split: str = "heldout",
    cache: Path | None = None,
    on_skip: Callable[[str], None] = ignore_message,
    collect: list[tuple[str, str]] | None = None,
    name: str = "data",
) -> Iterator["TokenDataset"]:
    """Open the tokens of the text or shards at ``data``.

    Args:
        vocab_size: the model's. Shards of a larger vocabulary or of another tokenizer are refused.
        split: "train" or "heldout", of prepared text or shards that have both.
        collect: receives (text, source) of each document, if the data is text.
        name: the argument's name, for messages.
    """
    from fastlm.data.shards import INDEX, TokenDataset, write_shards

    data = Path(data)
    if (data / split / INDEX).is_file():
        data = data / split
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
    texts = [] if collect is None else collect
    texts += _read_texts_with_sources(data, split, cache, on_skip)
    if not texts:
        raise InputError(f"{name} {data}: expected text, got none")
    with tempfile.TemporaryDirectory() as folder:
        write_shards((text for text, _ in texts), tokenizer, Path(folder))
        yield TokenDataset(folder)
