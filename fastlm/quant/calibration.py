"""Calibration text: windows of tokens like the quantized model's future inputs.

A method that is calibrated on one kind of text gains on that kind. GPTQ calibrated on documentation
was no better than rounding to nearest on web pages (docs/quantization.md). So the default is a mix
of kinds, and a text of another kind measures the gain out of domain.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastlm.data.conversations import FORMATS, read_conversations
from fastlm.data.corpus import is_split
from fastlm.data.shards import INDEX
from fastlm.data.texts import has_splits, token_dataset
from fastlm.errors import InputError
from fastlm.sources.packages import default_cache
from fastlm.sources.source_files import ignore_message, list_files, read_rows

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

# web pages, documentation and code from packages
CALIBRATION_MIX = (
    "sdist:llamafactory#*/c4_demo.jsonl",
    "sdist:django#*docs/*.txt",
    "sdist:django#*django/db/*.py",
)
OUT_OF_DOMAIN = "sdist:llamafactory#*/wiki_demo.txt"  # encyclopedia, which is not in the mix
CONVERSATION_KEYS = frozenset(("messages", "conversations", "instruction", "prompt"))


def text_windows(
    model: "CausalLM",
    tokenizer: "Tokenizer",
    data: str | Path | Sequence[str | Path],
    *,
    tokens: int,
    length: int,
    seed: int,
    cache: Path | None = None,
    on_skip: Callable[[str], None] = ignore_message,
) -> Tensor:
    """Return about `tokens` tokens of the text, shards or conversations at `data` (their training
    split) as windows (n, length), int64, at random positions that do not overlap.

    Several sources contribute equally many windows, in turns, as long as they have any.
    InputError: a source is shorter than a window.
    """
    if not isinstance(data, str | Path):
        share = -(-tokens // len(data))
        parts = [
            text_windows(
                model, tokenizer, source, tokens=max(share, length), length=length, seed=seed,
                cache=cache, on_skip=on_skip,
            )
            for source in data
        ]  # fmt: skip
        count = max(map(len, parts))
        interleaved = [part[i] for i in range(count) for part in parts if i < len(part)]
        return torch.stack(interleaved[: max(1, tokens // parts[0].shape[1])])
    length = min(length, model.context_limit)
    vocab = model.config.vocab_size
    cache = cache or default_cache()

    def windows(total: int, read: Callable[[int, int], np.ndarray]) -> Tensor:
        positions = total // length
        if not positions:
            raise InputError(f"calibration {data}: expected at least {length} tokens, got {total}")
        count = min(max(1, tokens // length), positions)
        sample = np.random.Generator(np.random.PCG64(seed)).permutation(positions)[:count]
        return torch.from_numpy(np.stack([read(int(p) * length, length) for p in sample]))

    if has_conversations(data, cache):
        ids = conversation_tokens(tokenizer, data, cache=cache, on_skip=on_skip)
        return windows(len(ids), lambda start, n: ids[start : start + n])
    with token_dataset(
        data, tokenizer, vocab, split="train", cache=cache, on_skip=on_skip
    ) as dataset:
        return windows(dataset.tokens, dataset.read)


def fetch_calibration_mix(cache: Path | None) -> None:
    """Fetch the packages of the default texts. InputError: that is not possible."""
    for source in (*CALIBRATION_MIX, OUT_OF_DOMAIN):
        try:
            list_files(source, cache=cache or default_cache())
        except InputError as error:
            raise InputError(
                "calibration: expected text of your own, the default text from packages"
                f" ({error}), or the method rtn, which needs none"
            ) from None


def has_conversations(data: str | Path, cache: Path) -> bool:
    """Return True if the first JSON row of the files at `data` is a conversation."""
    if is_split(data) or has_splits(data) or (Path(data) / INDEX).is_file():
        return False  # prepared text or shards
    files = [f for f in list_files(str(data), cache=cache)[0] if f.format in FORMATS]
    first = next((row for _, row in read_rows(files[0])), None) if files else None
    return (
        isinstance(first, dict) and "text" not in first and not CONVERSATION_KEYS.isdisjoint(first)
    )


def conversation_tokens(
    tokenizer: "Tokenizer",
    data: str | Path,
    *,
    cache: Path,
    on_skip: Callable[[str], None] = ignore_message,
) -> np.ndarray:
    """Return the tokens of the conversations at `data`, int64, one after another as the chat
    template writes them.
    """
    tokens: list[int] = []
    for row in read_conversations([str(data)], cache=cache, on_skip=on_skip):
        variables: dict[str, Any] = {} if row.tools is None else {"tools": row.tools}
        try:
            tokens += tokenizer.encode_chat(row.messages, add_generation_prompt=False, **variables)
        except InputError as error:
            raise InputError(f"{row.location}: {error}") from None
    return np.array(tokens, np.int64)
