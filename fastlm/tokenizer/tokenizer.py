"""Tokenizer: text to token ids and back, by a byte-level BPE trained here or by the tokenizer of an
existing model.

Hugging Face's ``tokenizers`` does the work. This class adds what a language model needs: role
tokens, chat templates, exact bytes per token, streaming, files in three formats. The alternative
was to train on pre-token counts of our own. It is reserved for corpora that exceed the library's
memory (one entry per distinct pre-token).

Special tokens that are spelt out in a text are plain text: ``encode(text)`` never yields a special
id, so no web page and no chat message can close a turn or end a document. ``special=True`` reads
them as transformers does.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from fastlm.errors import InputError, check_unicode
from fastlm.files import read_json, read_text, write_text
from fastlm.progress import Track, silent
from fastlm.sources.packages import model_path
from fastlm.tokenizer import chat_template, gguf_vocab
from fastlm.tokenizer.gguf_vocab import call_tokenizers
from fastlm.tokenizer.growth import check_growth

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
# tokens with which published chat and base models end their output
STOP_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # of a tokenizer trained here
TRAIN_CHARACTERS = 2**20  # of a document that the trainer gets at a time: bounds its memory
MAX_JSON_BYTES = 2**28  # the largest published tokenizer.json is 33 MB
MAX_IDS = 2**24  # the largest published vocabularies have 2**18
# Characters: shorter texts take less time than the interpreter's switch between threads
MIN_BATCH_CHARACTERS = 2**12
PART_CHARACTERS = 2**15  # that `Tokenizer.is_longer` encodes at a time: 10 ms, 10 MB
MAX_CUT_TOKENS = 8  # that a cut between two such parts may add: a word, and a space before it


class Tokenizer:
    """Turns text into token ids and back.

    ``bos_id``, ``eos_id``, ``pad_id``: int or None. ``chat_template``: Jinja text or None.
    ``byte_level``: whether tokens are bytes in GPT-2's alphabet (otherwise SentencePiece's).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        roles: Mapping[str, str],
        template: str | None = None,
    ) -> None:
        self._backend = backend
        self._complete_templates: set[Any] = set()  # that `check_template_is_complete` has accepted
        if self.vocab_size > MAX_IDS:  # the library lists the unused ids
            raise InputError(
                f"tokenizer: expected ids below {MAX_IDS:,}, got one of {self.vocab_size - 1:,}"
            )
        self._roles = {name: token for name, token in roles.items() if token is not None}
        self._backend = backend = _with_special_turns(backend, self._roles.values())
        self.chat_template = template
        ids = {name: backend.token_to_id(token) for name, token in self._roles.items()}
        for name, token in self._roles.items():
            if ids[name] is None:
                raise InputError(f"{name}: expected a token of the vocabulary, got {token!r}")
        self.bos_id, self.eos_id, self.pad_id = map(ids.get, ROLES[:3])
        added = {t.content: i for i, t in backend.get_added_tokens_decoder().items()}
        stops = {added[token] for token in STOP_TOKENS if token in added}
        self.stop_ids = frozenset(stops if self.eos_id is None else stops | {self.eos_id})
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
        kinds = {decoder.get("type"), *(d["type"] for d in decoder.get("decoders", ()))}
        self.byte_level = "ByteLevel" in kinds
        if not self.byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise InputError(
                "tokenizer: expected byte-level or SentencePiece-style BPE, "
                f"got a decoder of {sorted(map(str, kinds))}"
            )
        self._strip_first = bool(kinds & {"Strip", "Metaspace"})

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer of the ``tokenizers`` library that does the work."""
        return self._backend

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        added = self._backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @cached_property
    def _reserved_ids(self) -> frozenset[int]:
        """Ids of the special tokens, except the unknown token."""
        unknown = {self._roles.get("unk_token"), getattr(self._backend.model, "unk_token", None)}
        return frozenset(i for token, i in self._special_ids.items() if token not in unknown)

    @cached_property
    def _text_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, with special tokens as plain text (a flag on the whole object)."""
        # a file whose merges and vocabulary disagree gets this far
        copy = call_tokenizers(tokenizers.Tokenizer.from_str, self._backend.to_str())
        copy.encode_special_tokens = True
        return copy

    def _may_spell_special(self, text: str) -> bool:
        """Return whether a special token may be in the text. Without one, both backends give the
        same ids, and to create `_text_backend` takes as long as to load the tokenizer."""
        if "_text_backend" in vars(self):
            return True
        return any(normalized or content in text for content, normalized in self._spelled)

    @cached_property
    def _spelled(self) -> list[tuple[str, bool]]:
        added = self._backend.get_added_tokens_decoder().values()
        return [(t.content, t.normalized) for t in added if t.special]

    @cached_property
    def vocab_size(self) -> int:
        """The highest id plus one: the size that an embedding needs (ids may have gaps)."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def vocabulary_id(self, size: int) -> str:
        """Return a hash of the tokens with ids below ``size``. It is equal for copies of a
        tokenizer, for one with another chat template or with more tokens, and for one in a GGUF
        file, which fills up unused ids.
        """
        vocab = self._backend.get_vocab(with_added_tokens=True)
        tokens = sorted((i, t) for t, i in vocab.items() if i < size and t != f"[PAD{i}]")
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

    # training

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        track: Track = silent,
    ) -> "Tokenizer":
        """Train byte-level BPE with GPT-4's split pattern. The special tokens get the first ids.

        ``texts`` is read once, as a stream; memory grows with the number of distinct pre-tokens.
        All 256 bytes are tokens, so every text survives a round trip. The vocabulary is smaller
        than requested if the text runs out of pairs. The first special token ends documents (eos
        and pad). With ChatML's two tokens the chat template is ChatML.
        """
        check_vocab_size(vocab_size, special_tokens)
        if not special_tokens or len(set(special_tokens)) < len(special_tokens):
            raise InputError(f"special_tokens: expected distinct tokens, got {special_tokens!r}")
        if single := BYTE_OF.keys() & set(special_tokens):
            raise InputError(
                f"special_tokens: expected none that is the spelling of a byte, got {min(single)!r}"
            )
        backend = tokenizers.Tokenizer(BPE())
        backend.pre_tokenizer = gguf_vocab.byte_level((gguf_vocab.LLAMA3,))
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        characters = 0

        def pieces() -> Iterator[str]:
            nonlocal characters
            for text in track(texts, "tokenizer: reading", unit="documents"):
                characters += len(text)
                for start in range(0, len(text), TRAIN_CHARACTERS):
                    yield _valid(text[start : start + TRAIN_CHARACTERS])

        backend.train_from_iterator(pieces(), trainer)
        if not characters:
            raise InputError("texts: expected text to train on, got none")
        chat = {"<|im_start|>", "<|im_end|>"} <= set(special_tokens)
        roles = {"eos_token": special_tokens[0], "pad_token": special_tokens[0]}
        return cls(backend, roles, chat_template.CHATML if chat else None)

    # files

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a folder with tokenizer.json, that file itself, a .gguf file or model:smollm2."""
        path = model_path(path)
        if path.suffix == ".gguf":
            from fastlm.checkpoint.gguf_file import open_gguf

            return cls(*gguf_vocab.build_tokenizer(open_gguf(path)))
        file = path / "tokenizer.json" if path.is_dir() else path
        text = read_text(file, MAX_JSON_BYTES)
        try:
            check_growth(text)
            backend = call_tokenizers(tokenizers.Tokenizer.from_str, text)
        except InputError as error:
            raise InputError(f"{file}: expected a tokenizer.json, got: {error}") from error
        # settings of one call, which transformers saves with the tokenizer and does not load
        backend.no_truncation()
        backend.no_padding()
        config, legacy = (
            read_json(path) if (path := file.parent / name).exists() else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        roles = {name: _content(config.get(name) or legacy.get(name)) for name in ROLES}
        roles = {n: t for n, t in roles.items() if t and backend.token_to_id(t) is not None}
        template = config.get("chat_template")
        if (jinja := file.parent / "chat_template.jinja").exists():
            template = read_text(jinja)
        if isinstance(template, list):  # several with names; "default" is for chat
            templates = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = templates.get("default")
        return cls(backend, roles, template if isinstance(template, str) else None)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into ``folder``,
        each completely or not at all. ``transformers.AutoTokenizer`` reads them.
        """
        folder = Path(folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._roles,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        files = {
            "tokenizer.json": self._backend.to_str(pretty=True),
            "special_tokens_map.json": json.dumps(self._roles, indent=2, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        }
        for name, text in files.items():
            write_text(folder / name, text + "\n")

    # ids

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of ``text``. ``special=True`` returns what transformers' ``encode`` does:
        special tokens in the text become their ids, and BOS/EOS are added if the tokenizer does so.
        """
        text = _valid(text)
        plain = special or not self._may_spell_special(text)
        backend = self._backend if plain else self._text_backend
        ids = _encode(backend, text, special).ids
        return ids if special else self._checked(ids)

    def is_longer(self, text: str, max_tokens: int) -> bool:
        """Return whether a text certainly has more than ``max_tokens`` tokens, whether special
        tokens in it are text or not. It encodes no more of the text than it needs."""
        count = 0
        for start in range(0, len(text), PART_CHARACTERS):
            part = _valid(text[start : start + PART_CHARACTERS])
            count += len(_encode(self._backend, part, False)) - MAX_CUT_TOKENS
            if count > max_tokens:
                return True
        return False

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        """Encode each text, on all cores, without BOS and EOS. With ``parse_special`` special
        tokens in a text become their ids."""
        valid = [_valid(text) for text in texts]
        backend = self._backend if parse_special else self._text_backend
        batch = call_tokenizers(backend.encode_batch_fast, valid, add_special_tokens=False)
        return [e.ids if parse_special else self._checked(e.ids) for e in batch]

    def _checked(self, ids: list[int]) -> list[int]:
        """Return the ``ids`` of plain text; refuse special ones. If a special token is also a piece
        of ordinary text (one byte, a whole word), there is no other way to write that text.
        """
        if not self._reserved_ids.isdisjoint(ids):
            index = next(i for i in ids if i in self._reserved_ids)
            raise InputError(
                f"text: expected none with {self._backend.id_to_token(index)!r}, a special token"
                " that this tokenizer cannot write as text"
            )
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of ``ids``; special tokens are left out unless ``special``. Bytes that
        are not UTF-8 become U+FFFD.
        """
        stream = self.stream(special=special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, special: bool = False, first: bool = True) -> "TokenStream":
        """Return a decoder that accepts ids one by one; its pieces join to ``decode``'s text.

        Pass ``first=False`` if the ids continue a text: SentencePiece vocabularies put a space
        before a text, which is otherwise removed.
        """
        return TokenStream(self, special, first)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes that ``token_id`` stands for (its name for a special token)."""
        if not 0 <= token_id < self.vocab_size:
            raise InputError(f"token_id: expected 0 to {self.vocab_size - 1}, got {token_id}")
        return self._bytes[token_id]

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = self._backend.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index not in added and self.byte_level and BYTE_OF.keys() >= set(token):
                table[index] = bytes(BYTE_OF[character] for character in token)
            elif index in added or self.byte_level:  # or padding such as "[PAD 7]"
                table[index] = token.encode()
            elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
                table[index] = bytes([int(match[1], 16)])
            else:
                table[index] = token.replace("▁", " ").encode()
        return table

    # chat

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render ``messages`` ([{"role": ..., "content": ...}]) to the prompt text with the chat
        template.
        """
        return self._render(messages, add_generation_prompt, variables)[0]

    def _render(
        self,
        messages: Any,
        add_generation_prompt: bool,
        variables: dict[str, Any],
        date: str | None = None,
    ) -> tuple[str, chat_template.Ranges]:
        if self.chat_template is None:
            raise InputError("chat_template: expected one for chat, this tokenizer has none")
        variables = {"add_generation_prompt": add_generation_prompt, **variables}
        text, ranges = chat_template.render(
            self.chat_template, messages, variables, self._roles, date
        )
        return _valid(text), ranges

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        date: str | None = None,
        check: Callable[[str], Any] = lambda text: None,
        **variables: Any,
    ) -> list[int]:
        """Return the ids of ``render_chat``. A special token counts only where the template itself
        wrote all its characters. The template may join or cut constants for that; what it writes by
        ``format``, or by a ``%`` that is not constant, is text. The content of messages, tools and
        other variables is text. ``check`` is called with the rendered text before it is encoded,
        and may refuse it.
        """
        text, ranges = self._render(messages, add_generation_prompt, variables, date)
        check(text)
        return self._encode_rendered(text, ranges)

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        learnt: Sequence[bool] | None = None,
        *,
        date: str | None = None,
        **variables: Any,
    ) -> list[tuple[list[int], list[bool]]]:
        """Return a conversation as pairs (ids, mask). The mask marks the ids that a model is to
        learn: the assistant's messages, each with the token that ends it. ``learnt``: one flag per
        message; False leaves that message out of the mask.

        A template that appends messages to a text gives one pair. A template that writes a message
        differently when others follow (Qwen3 drops earlier reasoning) gives one pair per learnt
        answer, with the text before it. An answer is encoded apart from its prompt, as in
        generation: no token straddles the border. ``date``: see `chat_template.render`.

        InputError: a template that drops a message, its tool calls or the tools; a generation
        prompt with which answers do not begin; an answer without an end token.
        """
        self.check_can_train_on_chats()
        self.check_template_is_complete(messages, variables, date)
        text, ranges = self._render(messages, False, variables, date)
        # (begin, text up to the end of the answer, the template's ranges in it, whether to learn
        # it)
        answers = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:i], True, variables, date)[0]
            part, part_ranges = self._render(messages[: i + 1], False, variables, date)
            if not part.startswith(prompt):
                raise InputError(
                    "chat_template: expected a generation prompt with which answers begin,"
                    f" got {prompt[-40:]!r} before message {i}"
                )
            learn = learnt is None or learnt[i]
            if learn:
                _check_answer_is_complete(part[len(prompt) :], message, i)
            answers.append((len(prompt), part, part_ranges, learn))
        if all(text.startswith(part) for _, part, _, _ in answers):
            borders = [(begin, len(part), learn) for begin, part, _, learn in answers]
            return [self._masked(text, ranges, borders)]
        return [
            self._masked(part, part_ranges, [(begin, len(part), True)])
            for begin, part, part_ranges, learn in answers
            if learn
        ]

    def encode_reply(
        self, message: Mapping[str, Any], *, date: str | None = None, **variables: Any
    ) -> list[int]:
        """Return the ids between two of the assistant's messages with ``message`` (a tool's or a
        user's) between them: the token that ends the first, the message, the generation prompt.

        InputError: the template drops the message, or writes an earlier answer differently when the
        message follows.
        """
        messages = [{"role": role, "content": "a"} for role in ("user", "assistant")] + [message]
        self.check_template_is_complete(messages, variables, date)
        prompt = self._render(messages[:1], True, variables, date)[0]
        part = self._render(messages[:2], False, variables, date)[0]
        text, ranges = self._render(messages, True, variables, date)
        if not part.startswith(prompt) or not text.startswith(part):
            raise InputError(
                "chat_template: expected one that appends messages, got one that writes an answer"
                f" differently when a message of role {message['role']} follows"
            )
        ids, mask = self._masked(text, ranges, [(len(prompt), len(part), True)])
        return ids[len(mask) - 1 - mask[::-1].index(True) :]

    def check_can_train_on_chats(self) -> None:
        """Raise InputError if `encode_conversation` cannot serve this tokenizer."""
        if self._strip_first:
            raise InputError(
                "tokenizer: expected byte-level BPE to learn conversations, got one that puts a"
                " space before a text"
            )

    def _masked(
        self, text: str, ranges: chat_template.Ranges, answers: list[tuple[int, int, bool]]
    ) -> tuple[list[int], list[bool]]:
        """Encode a rendered text with the answers text[begin:end], and mask the learnt ones."""
        ids: list[int] = []
        mask: list[bool] = []
        start = 0
        for begin, end, learn in answers:
            prompt = self._encode_rendered(*_cut(text, ranges, start, begin))
            answer = self._encode_rendered(*_cut(text, ranges, begin, end))
            # gpt-oss ends each channel with an end token: the answer ends at the one without text
            # after
            stops = [n for n, i in enumerate(answer, 1) if i in self.stop_ids]
            stop = next((n for n in stops if not self.decode(answer[n:]).strip()), None)
            if stop is None:
                names = ", ".join(str(self._backend.id_to_token(i)) for i in sorted(self.stop_ids))
                raise InputError(
                    "chat_template: expected one that ends an answer with "
                    f"{names or 'an end token'},"
                    f" got {text[begin:end][-40:]!r}"
                )
            ids += prompt + answer
            # the line break after the end token is not learnt
            mask += [False] * len(prompt) + [learn] * stop + [False] * (len(answer) - stop)
            start = end
        rest = self._encode_rendered(*_cut(text, ranges, start, len(text)))
        return ids + rest, mask + [False] * len(rest)

    def check_template_is_complete(
        self, messages: Sequence[Mapping[str, Any]], variables: dict[str, Any], date: str | None
    ) -> None:
        """Refuse a template that drops a part of such messages. Each part is replaced by a
        placeholder, which must be in the rendered text. Each sequence of roles and parts is checked
        once.
        """
        has_tools = bool(variables.get("tools"))
        parts = tuple(
            (m["role"], bool((m.get("content") or "").strip()), len(m.get("tool_calls") or ()))
            for m in messages
        )
        if (key := (self.chat_template, parts, has_tools)) in self._complete_templates:
            return
        placeholders: dict[str, str] = {}  # text -> the part that it stands for

        def placeholder(part: str) -> str:
            name = f"mark{len(placeholders)}x"
            placeholders[name] = part
            return name

        copies = []
        for i, (message, (role, has_text, _)) in enumerate(zip(messages, parts)):
            copy = dict(message)
            if has_text:
                copy["content"] = placeholder(f"the text of message {i} ({role})")
            if calls := message.get("tool_calls"):
                part = f"the tool calls of message {i} ({role})"
                copy["tool_calls"] = [
                    {
                        **c,
                        "function": {
                            "name": placeholder(part),
                            "arguments": {"argument": placeholder(part)},
                        },
                    }
                    for c in calls
                ]
            copies.append(copy)
        if has_tools:
            name = placeholder("the tools")
            variables = {**variables, "tools": [_renamed(t, name) for t in variables["tools"]]}
        text = self._render(copies, False, variables, date)[0]
        for name, part in placeholders.items():
            if name not in text:
                raise InputError(f"chat_template: expected one that writes {part}, got none of it")
        self._complete_templates.add(key)

    @property
    def special_tokens(self) -> frozenset[str]:
        return frozenset(self._special_ids)

    def _encode_rendered(self, text: str, ranges: chat_template.Ranges) -> list[int]:
        """Return the ids of a rendered text. ``ranges``: those that the template itself wrote."""
        names = "|".join(map(re.escape, sorted(self._special_ids, key=len, reverse=True)))
        written = [
            (start + match.start(), match[0])
            for start, end in ranges
            for match in (re.finditer(names, text[start:end]) if names else ())
        ]
        encoding = _encode(self._backend, text, False, offsets=True)
        # the unknown token also stands for characters: it counts only where its name is in the text
        special = [
            (i, span)
            for i, span in zip(encoding.ids, encoding.offsets)
            if i in self._reserved_ids or text[slice(*span)].strip() in self._special_ids
        ]
        # an offset may include spaces that the token absorbs
        if len(special) == len(written) and all(
            i == self._special_ids[name] and start <= position and position + len(name) <= stop
            for (i, (start, stop)), (position, name) in zip(special, written)
        ):
            return encoding.ids
        # some special token is text: encode the parts between the template's special tokens
        ids: list[int] = []
        end = 0
        for start, name in written:
            ids += [*self.encode(text[end:start]), self._special_ids[name]]
            end = start + len(name)
        return ids + self.encode(text[end:])


class TokenStream:
    """``push(id)`` returns the text that is complete so far, ``flush()`` the rest at the end."""

    def __init__(self, tokenizer: Tokenizer, special: bool, first: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset() if special else frozenset(tokenizer._special_ids.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = first and tokenizer._strip_first

    def push(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        if token_id in self._hidden:
            return ""
        if self._strip:  # the space that the encoder put before the text
            data, self._strip = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


REASONING = ("reasoning_content", "reasoning", "thinking")


def _renamed(tool: Any, name: str) -> Any:
    """Return the tool under another name."""
    if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name} if isinstance(tool, Mapping) else tool


def _check_answer_is_complete(answer: str, message: Mapping[str, Any], index: int) -> None:
    """Refuse a template that cuts an answer or drops its reasoning; spaces may differ."""
    written = "".join(answer.split())
    for name in ("content", *REASONING):
        if "".join(str(message.get(name) or "").split()) not in written:
            raise InputError(
                f"chat_template: expected one that writes the complete {name} of message {index}"
                f" ({message['role']}), got {answer[:60]!r}"
            )


def _cut(
    text: str, ranges: chat_template.Ranges, start: int, stop: int
) -> tuple[str, chat_template.Ranges]:
    """Return text[start:stop], and the part of ``ranges`` in it."""
    inside = [(max(a, start) - start, min(b, stop) - start) for a, b in ranges]
    return text[start:stop], [(a, b) for a, b in inside if a < b]


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Raise InputError unless all bytes and the special tokens fit."""
    min_size = 256 + len(special_tokens)
    if vocab_size < min_size:
        raise InputError(
            f"vocab_size: expected at least {min_size} (256 bytes and the special tokens), "
            f"got {vocab_size}"
        )


# GPT-2's spelling of bytes: printable Latin-1 as itself, the others from U+0100 on
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF |= {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}


def _with_special_turns(
    backend: tokenizers.Tokenizer, roles: Iterable[str]
) -> tokenizers.Tokenizer:
    """Return the tokenizer with the tokens that begin or end a turn marked as special. Some files
    do not mark them, and a message that spells one would then end its turn.
    """
    turns = {*STOP_TOKENS, "<|im_start|>", *roles}
    added = backend.get_added_tokens_decoder().values()
    if all(token.special for token in added if token.content in turns):
        return backend
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] |= token["content"] in turns
    return call_tokenizers(tokenizers.Tokenizer.from_str, json.dumps(state))


def _encode(
    backend: tokenizers.Tokenizer, text: str, special: bool, offsets: bool = False
) -> tokenizers.Encoding:
    """Encode a text; ``special``: with BOS and EOS, if the tokenizer adds them.

    The library's `encode` holds the interpreter's lock (1.4 s for 660 KB); its batches do not.
    """
    if len(text) < MIN_BATCH_CHARACTERS:
        return call_tokenizers(backend.encode, text, add_special_tokens=special)
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    return call_tokenizers(encode, [text], add_special_tokens=special)[0]


def _valid(text: str) -> str:
    """Return ``text`` if UTF-8 can encode it (no lone surrogates)."""
    if not isinstance(text, str):
        raise InputError(f"text: expected str, got {type(text).__name__}")
    check_unicode(text, "text")
    return text


def _content(token: Any) -> str | None:
    """Return a role token as config files store it: text, or a mapping with ``content``."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
