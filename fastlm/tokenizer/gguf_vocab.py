"""The tokenizer inside a GGUF file, rebuilt for the ``tokenizers`` library.

A GGUF file contains tokens, merges or scores, and the *name* of its pre-tokenizer. llama.cpp
defines the split pattern of each name; the table is here. An unknown name is refused, because a
wrong pattern gives ids that look right.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from fastlm.errors import InputError
from fastlm.files import reason

if TYPE_CHECKING:
    from fastlm.checkpoint.gguf_file import GGUFFile

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = _GPT4 % r"\p{N}{1,3}"
QWEN2 = _GPT4 % r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = _CASED % (_CONTRACTION, _CONTRACTION, r"\p{N}{1,3}")
TEKKEN = _CASED % ("", "", r"\p{N}")
DIGIT = r"\p{N}"

# tokenizer.ggml.pre -> the patterns to split by, one after the other
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("gpt-2 phi-2 jina-es jina-de mpt olmo jais exaone4".split(), (GPT2,)),
    **dict.fromkeys("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral".split(), (LLAMA3,)),
    **dict.fromkeys("dbrx smaug-bpe glm4 chatglm-bpe lfm2 midm-2.0".split(), (LLAMA3,)),
    **dict.fromkeys("qwen2 stablelm2 deepseek-r1-qwen hunyuan megrez".split(), (QWEN2,)),
    **dict.fromkeys("smollm starcoder refact command-r".split(), (DIGIT, GPT2)),
    **dict.fromkeys("codeshell exaone minerva-7b".split(), (DIGIT, GPT2)),
    **dict.fromkeys("gpt-4o llama4".split(), (GPT4O,)),
    "tekken": (TEKKEN,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# names for which a pre-token that is in the vocabulary is one token, and BOS is added unless the
# file disables it
WHOLE_WORDS = frozenset(
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 tekken".split()
)

MAX_TOKEN_LENGTH = 512  # characters: `_merges` tries every cut; published ones have up to 128
ROLE_KEYS = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}  # fmt: skip
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type; 1 normal, 2 unknown, 5 unused, 6 byte


def byte_level(patterns: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Split by each pattern in turn, then spell bytes in GPT-2's printable alphabet."""
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def build_tokenizer(file: "GGUFFile") -> tuple[Tokenizer, dict[str, str], str | None]:
    """Return the tokenizer of a GGUF file, its role tokens (``bos_token`` -> text ...) and its chat
    template.
    """
    path = file.path

    def get(key: str, kind: Any, default: Any = None) -> Any:
        return file.get(f"tokenizer.ggml.{key}", kind, default)

    def refuse(key: str, message: str) -> InputError:
        return InputError(f"{path}: tokenizer.ggml.{key}: expected {message}")

    model, tokens = get("model", str), get("tokens", list)
    if model not in ("gpt2", "llama"):
        models = "gpt2 (byte-level BPE) or llama (SentencePiece BPE)"
        raise refuse("model", f"{models}, got {model!r:.60}")
    if not tokens:
        raise refuse("tokens", "a list of texts, got none")
    if len(set(tokens)) != len(tokens):
        raise refuse("tokens", "each token once, got duplicates")
    longest = max(tokens, key=len)
    if len(longest) > MAX_TOKEN_LENGTH:
        got = f"{len(longest)}: {longest!r:.60}"
        raise refuse("tokens", f"at most {MAX_TOKEN_LENGTH} characters each, got {got}")
    kinds = get("token_type", np.ndarray, np.empty(0)).tolist()
    if kinds and len(kinds) != len(tokens):
        raise refuse("token_type", f"{len(tokens)} entries, got {len(kinds)}")
    roles = {}
    for name, key in ROLE_KEYS.items():
        token_id = get(key, int)
        if token_id is None or token_id == 2**32 - 1:  # some writers store "none" as -1
            continue
        if not 0 <= token_id < len(tokens):
            raise InputError(
                f"{path}: {name}: expected an id below {len(tokens)} (the tokens), got {token_id}"
            )
        roles[name] = tokens[token_id]

    if model == "gpt2":
        pre = get("pre", str, "default")
        tokenizer = _byte_level_bpe(tokens, get("merges", list, ()), pre, path)
        add_bos = get("add_bos_token", bool, pre in WHOLE_WORDS)
    else:
        tokenizer = _sentencepiece(file, tokens, kinds, roles.get("unk_token"))
        add_bos = get("add_bos_token", bool, True)
    for kind, add in (
        (CONTROL, tokenizer.add_special_tokens),
        (USER_DEFINED, tokenizer.add_tokens),
    ):
        names = [token for token, k in zip(tokens, kinds) if k == kind and token]
        add([AddedToken(name, normalized=False, special=kind == CONTROL) for name in names])
    bos = [roles["bos_token"]] if add_bos and "bos_token" in roles else []
    eos = [roles["eos_token"]] if get("add_eos_token", bool, False) and "eos_token" in roles else []
    if bos or eos:
        # no pair templates: they need type ids that language models do not have
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*bos, *eos])]
        single = [*bos, "$A", *eos]
        tokenizer.post_processor = call_tokenizers(
            TemplateProcessing, single=single, special_tokens=ids
        )
    return tokenizer, roles, file.get("tokenizer.chat_template", str)


def call_tokenizers(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call the ``tokenizers`` library and turn its errors into InputError. The library raises bare
    Exception and, if Rust panics, a class that is not even an Exception.
    """
    try:
        return call(*arguments, **options)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"tokenizer: expected a consistent one, got: {reason(error):.200}"
        ) from None


def _byte_level_bpe(tokens: list[str], merges: Sequence[str], pre: str, path: Any) -> Tokenizer:
    if pre not in PRE_TOKENIZERS:
        names = ", ".join(sorted(PRE_TOKENIZERS))
        raise InputError(f"{path}: tokenizer.ggml.pre: expected one of {names}, got {pre!r:.60}")
    vocab = {token: index for index, token in enumerate(tokens)}
    # a byte-level token contains no space, so the only space separates the two halves
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    for pair in pairs:
        if not {*pair, "".join(pair)} <= vocab.keys():
            raise InputError(
                f"{path}: tokenizer.ggml.merges: expected two tokens whose union is a token, "
                f"got {pair!r:.80}"
            )
    if not pairs:
        raise InputError(f"{path}: tokenizer.ggml.merges: expected a list of merges, got none")
    tokenizer = Tokenizer(call_tokenizers(BPE, vocab, pairs, ignore_merges=pre in WHOLE_WORDS))
    tokenizer.pre_tokenizer = byte_level(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    file: "GGUFFile", tokens: list[str], kinds: list[int], unk: str | None
) -> Tokenizer:
    """Build BPE over characters: spaces as U+2581, unknown characters as their bytes (<0xNN>)."""
    scores = file.get("tokenizer.ggml.scores", np.ndarray, np.empty(0))
    if len(scores) != len(tokens):
        raise InputError(
            f"{file.path}: tokenizer.ggml.scores: expected one per token ({len(tokens)}),"
            f" got {len(scores)}"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    # Gemma's scores are not in merge order; the order of its tokens is
    gemma = file.get("general.architecture", str, "").startswith("gemma")
    rank = [-float(i) for i in range(len(tokens))] if gemma else scores.tolist()
    mergeable = [t for i, t in enumerate(tokens) if not kinds or kinds[i] in (1, USER_DEFINED)]
    if unk is None:
        unk = next((token for token, kind in zip(tokens, kinds) if kind == 2), None)
    merges = _merges(mergeable, vocab, rank)
    tokenizer = Tokenizer(
        call_tokenizers(BPE, vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=unk)
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, not gemma)
    spell = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spell]) if prefix else spell
    )
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return tokenizer


def _merges(tokens: list[str], vocab: dict[str, int], rank: list[float]) -> list[tuple[str, str]]:
    """Return every way to join two tokens into a third, best token first, ties by the halves' ids.

    SentencePiece stores no merges: it joins the adjacent pair whose union scores highest, which is
    the same rule.
    """
    token_set = set(tokens)
    merges = []
    for token in tokens:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        halves = [pair for pair in halves if token_set.issuperset(pair)]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-rank[vocab[token]], pair) for pair in halves]
    merges.sort(key=lambda entry: entry[0])  # stable: keeps the order inside one token
    return [pair for _, pair in merges]
