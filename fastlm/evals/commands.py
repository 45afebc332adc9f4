"""What ``fastlm eval`` and its like do with a path: shards, prepared documents or plain text,
measured.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.extract import extract
from fastlm.data.packages import default_cache
from fastlm.data.prepare import read_documents
from fastlm.data.shards import TokenDataset, write_shards
from fastlm.data.sources import ignore, read_source
from fastlm.errors import InputError
from fastlm.evals.bits_per_byte import compressed_bits_per_byte, evaluate
from fastlm.progress import silent

if TYPE_CHECKING:
    from fastlm.model import CausalLM
    from fastlm.tokenizer import Tokenizer

LONGEST_WINDOW = (
    1024  # by default: a longer context than this changes bits per byte little and costs much
)


def read_texts(source: str | Path, *, tell: Callable[[str], None] = ignore) -> Iterator[str]:
    """Texts of a source as ``fastlm data prepare`` takes it, or of the documents it prepared.
    ``tell`` gets why a file or a line is skipped.
    """
    if str(source).endswith(".jsonl.zst"):
        documents = read_documents(Path(source))
    else:
        documents = read_source(str(source), cache=default_cache(), tell=tell)
    return (text for document in documents if (text := extract(document)))


def text_bits_per_byte(
    model: "CausalLM",
    tokenizer: "Tokenizer",
    data: str | Path,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    track=silent,
    tell: Callable[[str], None] = ignore,
) -> dict[str, Any]:
    """Bits per byte of the shards or the text at ``data``; for text also of xz -9e and zstd -19."""
    seq_len = seq_len or min(model.context_limit, LONGEST_WINDOW)
    options = {"stride": stride or max(1, seq_len // 2), "track": track}
    vocab_size = model.config.vocab_size
    packed = {}
    if (Path(data) / "index.json").exists():
        dataset = TokenDataset(data)
        if dataset.vocab_size > vocab_size:
            raise InputError(
                f"data: wanted tokens of a vocabulary of at most {vocab_size},"
                f" got {dataset.vocab_size}"
            )
        result = evaluate(model, dataset, seq_len, batch_size, **options)
    else:
        texts = list(read_texts(data, tell=tell))
        if not texts:
            raise InputError(f"data {data}: wanted text, got none")
        packed = compressed_bits_per_byte(texts)
        with tempfile.TemporaryDirectory() as folder:
            write_shards(texts, tokenizer, Path(folder))
            result = evaluate(model, TokenDataset(folder), seq_len, batch_size, **options)
    return {
        "bits_per_byte": result.bits_per_byte,
        **{f"bits_per_byte_{name}": value for name, value in packed.items()},
        "loss": result.loss, "tokens": result.tokens, "bytes": round(result.bytes),
        "seq_len": seq_len,
    }  # fmt: skip
