"""Answers of a given form: JSON, a JSON schema, a regular expression, one of some texts, a grammar.

llguidance compiles the form and says at each place which tokens may come next. A form that it
cannot compile, or that it would only keep to in part, is refused.
"""

import json
import threading
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Any

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

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


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
            raise FormError(
                f"{form.param}: wanted llguidance on the server ({INSTALL}), not found",
                param=form.param,
            ) from None
        _check_size(form)
        with self._lock:
            tokens = self._tokens
        limits = llguidance.LLParserLimits(**LIMITS)
        try:
            grammar = _grammar(form)
            failed, told = llguidance.LLMatcher.validate_grammar_with_warnings(
                grammar, tokens, limits=limits
            )
            matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)
            refusal = " ".join(told) or matcher.get_error()
        except InputError as error:
            raise FormError(f"{form.param}: {error}", param=form.param) from None
        except (ValueError, TypeError) as error:
            failed, refusal, matcher = True, str(error), None
        if failed or refusal or matcher is None:
            text = " ".join((refusal or "it has no meaning").split())
            raise FormError(
                f"{form.param}: wanted what llguidance can compile, got: {text:.400}",
                param=form.param,
            )
        first = _State(matcher, self, form)
        try:
            first.check()
        except ConstraintError as error:
            raise FormError(f"{form.param}: {error}", param=form.param) from None
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
    tools, value = (), form.value
    if form.kind == "call":
        tools, value = form.value, None
    elif form.kind == "calls":
        tools, value = form.value[0], None
    elif form.kind == "calls_or":
        tools, value = form.value[0], form.value[2].value
    elif form.kind == "generic":
        tools, value = form.value.tools, form.value.response
    for part, most in ((tools, MAX_BYTES * 4), (value, MAX_BYTES)):
        try:
            size = len(json.dumps(part, ensure_ascii=False).encode(errors="surrogatepass"))
        except RecursionError:
            size = most + 1
        if size > most:
            raise FormError(f"{form.param}: expected at most {most} bytes", param=form.param)


def _grammar(form: Form) -> str:
    from llguidance import LLMatcher, grammar_from

    if form.kind in ("json_object", "json_schema"):
        schema = {"type": "object"} if form.kind == "json_object" else close_objects(form.value)
        options: Any = OPTIONS
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.value)
    if form.kind == "choice":
        return grammar_from("choice", json.dumps(form.value))
    if form.kind == "call":
        return LLMatcher.grammar_from_lark(_call(form.value))
    if form.kind == "calls":
        return LLMatcher.grammar_from_lark(_calls(*form.value))
    if form.kind == "calls_or":
        return LLMatcher.grammar_from_lark(_calls_or(*form.value))
    if form.kind == "generic":
        return LLMatcher.grammar_from_lark(_generic(form.value))
    return LLMatcher.grammar_from_lark(form.value)


def _call(tools: list[Any]) -> str:
    """A Lark grammar of a call of one of the tools, as `fastlm.serve.tools` reads it."""
    names = [f"call{i}" for i in range(len(tools))]
    rules = [f"start: {' | '.join(names)}"]
    for name, tool in zip(names, tools):
        function = tool["function"]
        before = f'{OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": '
        after = f"}}\n{CLOSE}"
        arguments = _arguments(close_arguments(function.get("parameters")))
        rules.append(f"{name}: {json.dumps(before)} {arguments} {json.dumps(after)}")
    return "\n".join(rules)


def _calls_or(tools: list[Any], several: bool, form: Form) -> str:
    """A Lark grammar of calls of the tools, or of JSON of a form."""
    begin, *rules = _call(tools).splitlines()
    one = begin.removeprefix("start: ")
    schema = {"type": "object"} if form.kind == "json_object" else form.value
    calls = "call (SPACE call)*" if several else "call"
    return "\n".join(
        [
            "start: calls | form",
            f"calls: {calls}",
            f"call: {one}",
            f"form: {_json(close_objects(schema))}",
            f"SPACE: /{WHITESPACE}/",
            *rules,
        ]
    )


def _generic(value: GenericTools) -> str:
    """A Lark grammar of `fastlm.serve.generic_tools`."""
    more = ' (SPACE "," SPACE call)*' if value.several else ""
    kinds = "calls" if value.required else "calls | response"
    response, quoted = json.dumps(json.dumps("response")), json.dumps(json.dumps("tool_calls"))
    names = [f"call{i}" for i in range(len(value.tools))]
    rules = [
        f'start: "{{" SPACE ({kinds}) SPACE "}}"',
        f'calls: {quoted} SPACE ":" SPACE "[" SPACE call{more} SPACE "]"',
        f"call: {' | '.join(names)}",
        f"SPACE: /{WHITESPACE}/",
    ]
    if not value.required:
        schema = close_objects(value.response)
        rules.append(f'response: {response} SPACE ":" SPACE {_json(schema)}')
    return "\n".join([*rules, *_call_rules(names, value.tools, lambda function: True)])


def _calls(tools: list[Any], several: bool) -> str:
    """A Lark grammar of text with calls of the tools in it; those that are strict have arguments
    that keep to their schemas. Not ``several``: one at most, which ends the answer.
    """
    names = [f"call{i}" for i in range(len(tools))]
    listed = ' | "[" SPACE call (SPACE "," SPACE call)* SPACE "]"' if several else ""
    rules = [
        "start: block* REST" if several else "start: block | REST",
        f'block: head SPACE (call{listed}) SPACE "{CLOSE}"',
        f'head[lazy]: TEXT "{OPEN}"',
        "TEXT: /(.|\\n)*/",
        f"REST: /(.|\\n)*/ & ~/(.|\\n)*{OPEN}(.|\\n)*/",
        f"call: {' | '.join(names)}",
        f"SPACE: /{WHITESPACE}/",
    ]
    rules += _call_rules(names, tools, lambda function: bool(function.get("strict")))
    return "\n".join(rules)


def _call_rules(
    names: list[str], tools: "Sequence[Any]", keeps: "Callable[[Any], bool]"
) -> "Iterator[str]":
    """Lark rules of these names, of a call of each tool as JSON; where it ``keeps`` to its schema,
    so do the arguments."""
    for name, tool in zip(names, tools):
        function = tool["function"]
        called = [json.dumps(json.dumps(text)) for text in ("name", function["name"], "arguments")]
        parameters = close_arguments(function.get("parameters")) if keeps(function) else {}
        arguments = _arguments(parameters)
        parts = ('"{"', called[0], '":"', called[1], '","', called[2], '":"', arguments, '"}"')
        yield f"{name}: {' SPACE '.join(parts)}"


def _arguments(parameters: Any) -> str:
    """Lark for an object that keeps to a schema."""
    return _json({"type": "object", **parameters})


def _json(schema: Any) -> str:
    """Lark for JSON that keeps to a schema."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return f"%json {json.dumps({**schema, 'x-guidance': OPTIONS})}"
