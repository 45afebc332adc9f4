"""Bits per byte of whatever a path names: prepared text, shards, or plain text."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.extract import extract
from fastlm.data.packages import default_cache
from fastlm.data.prepare import FUNNEL, HELDOUT, TRAIN, read_documents
from fastlm.data.sources import ignore, read_source
from fastlm.errors import InputError
from fastlm.progress import silent

if TYPE_CHECKING:
    from fastlm.data.shards import TokenDataset
    from fastlm.model.causal_lm import CausalLM
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
    tell: Callable[[str], None] = ignore,
) -> Iterator[str]:
    """Yield the texts of `read_sourced`."""
    yield from (text for text, _ in read_sourced(source, part=part, cache=cache, tell=tell))


def read_sourced(
    source: str | Path,
    *,
    part: str = "heldout",
    cache: Path | None = None,
    tell: Callable[[str], None] = ignore,
) -> Iterator[tuple[str, str]]:
    """Yield the texts of a source that ``fastlm data prepare`` accepts, or of what it prepared,
    each with the source that its document names.

    Args:
        source: a prepared folder, a ``.jsonl.zst`` file of documents, or a source.
        cache: where packages are kept.
        part: "train" or "heldout": the part of a prepared folder.
        tell: receives the reason why a file or a line is skipped.
    """
    if (Path(source) / FUNNEL).is_file():
        source = Path(source) / {"train": TRAIN, "heldout": HELDOUT}[part]
    if str(source).endswith(".jsonl.zst"):
        yield from ((document.text, document.source) for document in read_documents(Path(source)))
    else:
        documents = read_source(str(source), cache=cache or default_cache(), tell=tell)
        yield from ((text, d.source) for d in documents if (text := extract(d)))


def check_window(context: int, seq_len: int | None, stride: int | None) -> tuple[int, int]:
    """Return the window and stride: by default the context up to `LONGEST_WINDOW`, half
    the window.
    """
    window = seq_len or min(context, LONGEST_WINDOW)
    if stride is not None and stride > window:
        raise InputError(f"stride: wanted at most the window of {window} tokens, got {stride}")
    return window, stride or max(1, window // 2)


def text_bits_per_byte(
    model: "CausalLM",
    tokenizer: "Tokenizer",
    data: str | Path,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
    document_mask: bool = False,
    compressors: bool = True,
    cache: Path | None = None,
    track=silent,
    tell: Callable[[str], None] = ignore,
) -> dict[str, Any]:
    """Measure bits per byte of the text or shards at ``data``; for text also of xz -9e and zstd
    -19; and of each source, if its documents have several (``domains``).

    The default window is the model's context, at most `LONGEST_WINDOW`; the default stride is half
    of it. ``document_mask``: for models trained with it.
    """
    from fastlm.evals.bits_per_byte import compressed_bits_per_byte, evaluate
    from fastlm.evals.domains import evaluate_domains

    seq_len, stride = check_window(model.context_limit, seq_len, stride)
    texts: list[tuple[str, str]] = []
    options: dict[str, Any] = {"stride": stride, "document_mask": document_mask, "track": track}
    domains: dict[str, Any] = {}
    with token_dataset(
        data, tokenizer, model.config.vocab_size, cache=cache, tell=tell, keep=texts
    ) as dataset:
        packed: dict[str, Any] = {}
        if texts and compressors:
            packed = compressed_bits_per_byte(t for t, _ in texts) | {"documents": len(texts)}
        sources = [source for _, source in texts]
        if len(set(sources)) > 1:
            sizes = [len(text.encode()) for text, _ in texts]
            result, domains = evaluate_domains(
                model, dataset, sources, sizes, seq_len, batch_size, **options
            )
        else:
            result = evaluate(model, dataset, seq_len, batch_size, **options)
    return {
        "bits_per_byte": result.bits_per_byte,
        **{f"bits_per_byte_{name}": packed[name] for name in ("xz", "zstd") if packed},
        "loss": result.loss, "tokens": result.tokens, "bytes": round(result.bytes),
        **({"documents": packed["documents"]} if packed else {}),
        "seq_len": seq_len, "stride": stride, **({"domains": domains} if domains else {}),
    }  # fmt: skip


@contextmanager
def token_dataset(
    data: str | Path,
    tokenizer: "Tokenizer",
    vocab_size: int,
    *,
    part: str = "heldout",
    cache: Path | None = None,
    tell: Callable[[str], None] = ignore,
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
                f"{name}: wanted tokens of a vocabulary of at most {vocab_size},"
                f" got {dataset.vocab_size}"
            )
        dataset.check_tokenizer(tokenizer, name)
        yield dataset
        return
    texts = [] if keep is None else keep
    texts += read_sourced(data, part=part, cache=cache, tell=tell)
    if not texts:
        raise InputError(f"{name} {data}: wanted text, got none")
    with tempfile.TemporaryDirectory() as folder:
        write_shards((text for text, _ in texts), tokenizer, Path(folder))
        yield TokenDataset(folder)
