"""Convert a tokenizer to GGUF metadata: the reverse of `fastlm.tokenizer.gguf_vocab`."""

import json
from typing import Any

from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError
from fastlm.tokenizer.gguf_vocab import (
    CONTROL,
    DIGIT,
    GPT2,
    PRE_TOKENIZERS,
    USER_DEFINED,
    WHOLE_WORDS,
)
from fastlm.tokenizer.tokenizer import Tokenizer

NORMAL, UNUSED = 1, 5
PREFERRED = ("gpt-2", "llama-bpe", "dbrx", "qwen2", "smollm")  # of names with the same patterns


def gguf_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Return the ``tokenizer.*`` entries, one token for each row of the embedding.

    InputError: not byte-level BPE, or a split pattern that llama.cpp does not have.
    """
    backend = tokenizer.backend
    state = json.loads(backend.to_str())
    if not tokenizer.byte_level or state["model"].get("type", "BPE") != "BPE":
        raise InputError(
            "tokenizer: expected byte-level BPE for GGUF, got SentencePiece or another"
        )
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [UNUSED] * config.vocab_size
    for token, index in vocab.items():
        if index >= config.vocab_size:
            raise InputError(
                f"tokenizer: expected ids below {config.vocab_size} (the embedding), got {index}"
            )
        tokens[index], kinds[index] = token, NORMAL
    for index, token in backend.get_added_tokens_decoder().items():
        kinds[index] = CONTROL if token.special else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    before, after = _added_ids(tokenizer)
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre_tokenizer(state),
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "add_space_prefix": False,
    }
    eos = config.eos_token_id
    ends = [eos] if isinstance(eos, int) else list(eos or ())
    if tokenizer.eos_id is not None and tokenizer.eos_id not in ends:
        ends = [tokenizer.eos_id, *ends] if not ends else [*ends, tokenizer.eos_id]
    ids = {
        "bos": before[0] if before else _first_not_none(tokenizer.bos_id, config.bos_token_id),
        **dict(zip(("eos", "eot", "eom"), ends)),
        "padding": _first_not_none(tokenizer.pad_id, config.pad_token_id),
    }
    values |= {f"{role}_token_id": i for role, i in ids.items() if i is not None}
    entries = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if tokenizer.chat_template is not None:
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    return entries


def _first_not_none(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


def _added_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that transformers' ``encode`` adds before and after a text."""
    plain, special = tokenizer.encode("a"), tokenizer.encode("a", special=True)
    start = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
    return special[:start], special[start + len(plain) :]


def pre_tokenizer(state: dict[str, Any]) -> str:
    """Return llama.cpp's name of the split pattern of the tokenizer.json ``state``."""
    normalizer = (state.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp does not normalize; most text is NFC anyway
        raise InputError(f"tokenizer: expected no normalizer for GGUF, got {normalizer}")
    patterns = tuple(_patterns(state.get("pre_tokenizer") or {}))
    ignore_merges = bool(state["model"].get("ignore_merges"))
    names = [
        name
        for name, split in PRE_TOKENIZERS.items()
        if split == patterns and (name in WHOLE_WORDS) == ignore_merges
    ]
    if not names:
        raise InputError(
            f"tokenizer: expected a split pattern that llama.cpp has, got {patterns!r:.200}"
        )
    return next((name for name in PREFERRED if name in names), names[0])


def _patterns(step: dict[str, Any]) -> list[str]:
    kind = step.get("type")
    if kind == "Sequence":
        return [pattern for inner in step["pretokenizers"] for pattern in _patterns(inner)]
    if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
        return [step["pattern"].get("Regex", "?")]
    if kind == "Digits" and step.get("individual_digits"):
        return [DIGIT]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [GPT2] if step.get("use_regex", True) else []
    raise InputError(f"tokenizer: expected a pre-tokenizer that llama.cpp has, got {kind}")
