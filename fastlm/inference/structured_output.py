"""Answers of a given form: JSON, a JSON schema, a regular expression, one of some texts, a grammar.

llguidance compiles the form and says at each place which tokens may come next. A form that it
cannot compile, or that it would only keep to in part, is refused.
"""

import json
import threading
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.inference.forms import CLOSE, OPEN, Form, GenericTools
from fastlm.inference.json_schemas import close_arguments, close_objects
from fastlm.inference.requests import Constraint, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fastlm.checkpoint.config import ModelConfig
    from fastlm.tokenizer.tokenizer import Tokenizer

# Between the parts of JSON: as compact or indented JSON has it. Any amount would let a model write
# spaces to the end of the context.
WHITESPACE = r"[ ]?|\n[ ]{0,32}"
# over what a schema itself may say: "lenient" ignores what cannot be compiled
OPTIONS = {"whitespace_pattern": WHITESPACE, "lenient": False}
JSON_KINDS = ("json_object", "json_schema", "call", "calls", "calls_or", "generic")
INSTALL = "pip install 'fastlm[serve]'"
MAX_BYTES = 2**16  # of a schema, an expression or a grammar; of all tools four times that
# Digits of a JSON number before and after its point: a float has 17. Without a bound, a model may
# write them to the end of the context.
MAX_DIGITS = 17
# llguidance's work for a mask: a fifth of its own bounds, at which a grammar takes 2 s a mask.
# 500 fields, 2,000 constants, 200 variants of an object and a text of 64 KiB stay below.
LIMITS = {
    "initial_lexer_fuel": 300_000, "step_lexer_fuel": 60_000, "step_max_items": 10_000,
    "max_lexer_states": 50_000, "max_items_in_row": 500, "verbose_errors": False,
}  # fmt: skip


class FormError(InputError):
    """A form that cannot be compiled. ``param``: the field of the request that asks for it."""

    def __init__(self, form: Form, message: object):
        super().__init__(f"{form.param}: {message}")
        self.param = form.param


class Grammars:
    """Compiles forms for one tokenizer. Its methods may run in any thread."""

    def __init__(self, tokenizer: "Tokenizer", config: "ModelConfig"):
        self.tokenizer, self.vocab_size = tokenizer, config.vocab_size
        self.ends = sorted(tokenizer.stop_ids | config.stop_ids)
        self._lock = threading.Lock()

    def constraint(self, form: Form) -> "Callable[[], Constraint]":
        """What makes the state of an answer of this form (`Request.constraint`). FormError: the
        form cannot be compiled, llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            message = f"expected llguidance on the server ({INSTALL}), not found"
            raise FormError(form, message) from None
        _check_size(form)
        with self._lock:
            tokens = self._tokens
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = None
        try:
            grammar = _grammar(form)
            _, warnings = llguidance.LLMatcher.validate_grammar_with_warnings(
                grammar, tokens, limits=limits
            )
            matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)
            refusal = " ".join(warnings) or matcher.get_error()
        except InputError as error:
            raise FormError(form, error) from None
        except (ValueError, TypeError) as error:
            refusal = str(error) or "it has no meaning"
        if refusal or matcher is None:
            refusal = " ".join(refusal.split())
            raise FormError(form, f"expected what llguidance can compile, got: {refusal:.400}")
        first = _State(matcher, self, form)
        try:
            first.check()
        except ConstraintError as error:
            raise FormError(form, error) from None
        return first.copy

    @cached_property
    def digits(self) -> Tensor:
        """Which tokens begin with a digit, (V,) bool."""
        return torch.tensor([token[:1].isdigit() for token in self._token_bytes])

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        known = min(self.vocab_size, self.tokenizer.vocab_size)
        tokens = [self.tokenizer.token_bytes(i) for i in range(known)]
        return tokens + [b""] * (self.vocab_size - known)

    def token_bytes(self, token: int) -> bytes:
        return self._token_bytes[token]

    @cached_property
    def _tokens(self) -> Any:
        """The vocabulary as llguidance has it."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self.tokenizer, self._token_bytes, self.ends)),
            n_vocab=self.vocab_size,
            eos_token=self.ends or None,
        )


class _Vocabulary:
    """What llguidance's `TokenizerWrapper` reads."""

    def __init__(self, tokenizer: "Tokenizer", tokens: list[bytes], ends: list[int]):
        self.tokenizer, self.tokens = tokenizer, tokens
        self.eos_token_id = ends[0] if ends else len(tokens) - 1
        self.bos_token_id = tokenizer.bos_id
        special = {token.encode() for token in tokenizer.special_tokens}
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if text in special]

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


class _State:
    """A `Constraint`. ``forced``: the next tokens, where only one text can follow."""

    def __init__(self, matcher: Any, grammars: Grammars, form: Form):
        self.matcher, self.grammars, self.form = matcher, grammars, form
        self.forced: deque[int] = deque()
        self.json = None if form.kind not in JSON_KINDS else _JsonText(form.kind == "calls")

    def copy(self) -> "_State":
        """Return the state of another answer."""
        other = _State(self.matcher.deep_copy(), self.grammars, self.form)
        other.forced = self.forced.copy()
        return other

    def check(self) -> None:
        """Raise ConstraintError if no first token may come, or none after it."""
        mask = self.mask()
        if not bool(mask.any()):
            raise ConstraintError("expected a grammar that some text fits, got none")
        after = self.copy()
        after.accept(int(mask.long().argmax()))
        after.check_error()

    def check_error(self) -> None:
        if self.matcher.is_error():  # too much work for a step
            why = self.matcher.get_error().split("\n")[0]
            if why.startswith("NoExtension"):
                why = "no text fits it"
            raise ConstraintError(f"expected a smaller grammar, got: {why:.200}")

    def mask(self) -> Tensor:
        """Which tokens may come next, (V,) bool."""
        allowed = torch.zeros(self.grammars.vocab_size, dtype=torch.bool)
        if self.matcher.is_stopped() and not self.matcher.is_error():
            allowed[self.grammars.ends] = True
            return allowed
        if not self.forced:
            # all at once: each mask would encode all the text that is forced
            self.forced.extend(self.matcher.compute_ff_tokens())
        if self.forced:
            allowed[self.forced[0]] = True
            return allowed
        found = self.matcher.compute_bitmask()
        self.check_error()
        words = torch.frombuffer(bytearray(found), dtype=torch.uint8)
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = bits.flatten()[: self.grammars.vocab_size].bool()
        if self.json is not None and self.json.digits >= MAX_DIGITS:
            fewer = allowed & ~self.grammars.digits
            return fewer if bool(fewer.any()) else allowed
        return allowed

    def accept(self, token: int) -> None:
        """Move on by a token."""
        if self.forced and self.forced.popleft() != token:
            self.forced.clear()
        if self.json is not None:
            self.json.add(self.grammars.token_bytes(token))
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
            self.check_error()


class _JsonText:
    """Follows JSON: ``digits`` of the number that is written now. ``inside``: JSON is what stands
    between the marks of tool calls alone."""

    def __init__(self, inside: bool):
        self.digits = 0
        self._inside, self._text = inside, b""
        self._active, self._string, self._escape = not inside, False, False

    def add(self, data: bytes) -> None:
        for byte in data:
            if self._inside:
                self._follow_marks(byte)
            if not self._active:
                continue
            self.digits = self.digits + 1 if not self._string and 48 <= byte <= 57 else 0
            if self._escape:
                self._escape = False
            elif byte == ord("\\"):
                self._escape = self._string
            elif byte == ord('"'):
                self._string = not self._string

    def _follow_marks(self, byte: int) -> None:
        self._text = (self._text + bytes((byte,)))[-len(CLOSE) :]
        if self._text.endswith(OPEN.encode()):
            self._active, self._string, self._escape = True, False, False
        elif self._text == CLOSE.encode() and not self._string:
            self._active, self.digits = False, 0


def _check_size(form: Form) -> None:
    """FormError: a form of more than `MAX_BYTES`, or tools of more than four times that."""
    match form.kind, form.value:
        case "call", tools:
            value = None
        case "calls", (tools, _):
            value = None
        case "calls_or", (tools, _, other):
            value = other.value
        case "generic", GenericTools(tools=tools, response=value):
            pass
        case _, value:
            tools = ()
    for part, most in ((tools, MAX_BYTES * 4), (value, MAX_BYTES)):
        try:
            size = len(json.dumps(part, ensure_ascii=False).encode(errors="surrogatepass"))
        except RecursionError:
            size = most + 1
        if size > most:
            raise FormError(form, f"expected at most {most} bytes")


def _grammar(form: Form) -> str:
    from llguidance import LLMatcher, grammar_from

    if form.kind in ("json_object", "json_schema"):
        schema, options = json.dumps(_schema(form)), cast(Any, OPTIONS)
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.value)
    if form.kind == "choice":
        return grammar_from("choice", json.dumps(form.value))
    if form.kind == "grammar":
        return LLMatcher.grammar_from_lark(form.value)
    rules = {"call": _written_calls, "calls": _calls, "calls_or": _calls_or, "generic": _generic}
    return LLMatcher.grammar_from_lark("\n".join(rules[form.kind](form.value)))


def _schema(form: Form) -> Any:
    return {"type": "object"} if form.kind == "json_object" else close_objects(form.value)


def _written_calls(tools: list[Any], start: str = "start") -> list[str]:
    """Lark rules of a call of one of the tools, as `fastlm.serve.tool_parser` reads it."""
    names = [f"call{i}" for i in range(len(tools))]
    rules = [f"{start}: {' | '.join(names)}"]
    for name, tool in zip(names, tools):
        function = tool["function"]
        before = f'{OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": '
        after = f"}}\n{CLOSE}"
        arguments = _arguments(close_arguments(function.get("parameters")))
        rules.append(f"{name}: {json.dumps(before)} {arguments} {json.dumps(after)}")
    return rules


def _calls_or(value: tuple[list[Any], bool, Form]) -> list[str]:
    """Lark rules of calls of the tools, or of JSON of a form."""
    tools, several, form = value
    return [
        "start: calls | form",
        f"calls: {'call (SPACE call)*' if several else 'call'}",
        f"form: {_json(_schema(form))}",
        f"SPACE: /{WHITESPACE}/",
        *_written_calls(tools, "call"),
    ]


def _generic(value: GenericTools) -> list[str]:
    """Lark rules of `fastlm.serve.generic_tools`."""
    more = ' (SPACE "," SPACE call)*' if value.several else ""
    kinds = "calls" if value.required else "calls | response"
    rules = [
        f'start: "{{" SPACE ({kinds}) SPACE "}}"',
        f'calls: {_quoted("tool_calls")} SPACE ":" SPACE "[" SPACE call{more} SPACE "]"',
        *_json_calls(value.tools, lambda function: True),
    ]
    if not value.required:
        response = _json(close_objects(value.response))
        rules.append(f'response: {_quoted("response")} SPACE ":" SPACE {response}')
    return rules


def _calls(value: tuple[list[Any], bool]) -> list[str]:
    """Lark rules of text with calls of the tools in it; those that are strict have arguments that
    keep to their schemas. Not ``several``: one at most, which ends the answer.
    """
    tools, several = value
    listed = ' | "[" SPACE call (SPACE "," SPACE call)* SPACE "]"' if several else ""
    return [
        "start: block* REST" if several else "start: block | REST",
        f'block: head SPACE (call{listed}) SPACE "{CLOSE}"',
        f'head[lazy]: TEXT "{OPEN}"',
        "TEXT: /(.|\\n)*/",
        f"REST: /(.|\\n)*/ & ~/(.|\\n)*{OPEN}(.|\\n)*/",
        *_json_calls(tools, lambda function: bool(function.get("strict"))),
    ]


def _json_calls(tools: "Sequence[Any]", keeps: "Callable[[Any], bool]") -> "Iterator[str]":
    """Lark rules of ``call``, a call of one of the tools as JSON; where it ``keeps`` to its schema,
    so do the arguments."""
    yield f"call: {' | '.join(f'call{i}' for i in range(len(tools)))}"
    yield f"SPACE: /{WHITESPACE}/"
    for i, tool in enumerate(tools):
        function = tool["function"]
        parameters = close_arguments(function.get("parameters")) if keeps(function) else {}
        parts = (
            '"{"', _quoted("name"), '":"', _quoted(function["name"]), '","', _quoted("arguments"),
            '":"', _arguments(parameters), '"}"',
        )  # fmt: skip
        yield f"call{i}: {' SPACE '.join(parts)}"


def _quoted(text: str) -> str:
    """Lark for a text as JSON."""
    return json.dumps(json.dumps(text))


def _arguments(parameters: Any) -> str:
    """Lark for an object that keeps to a schema."""
    return _json({"type": "object", **parameters})


def _json(schema: Any) -> str:
    """Lark for JSON that keeps to a schema."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return f"%json {json.dumps({**schema, 'x-guidance': OPTIONS})}"
