"""Structured output: answers that are JSON or match a JSON schema, a regular expression, one of
several texts, or a grammar.

llguidance compiles the format and computes which tokens may come next. A format that it cannot
compile, or would enforce only in part, is refused.
"""

import json
import threading
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.inference.json_schemas import close_arguments, close_objects
from fastlm.inference.output_format import CLOSE, OPEN, GenericTools, OutputFormat
from fastlm.inference.requests import Constraint, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fastlm.checkpoint.config import ModelConfig
    from fastlm.tokenizer.tokenizer import Tokenizer

# White space between the parts of JSON, as in compact or indented JSON. With an unbounded amount, a
# model could write spaces to the end of the context.
WHITESPACE = r"[ ]?|\n[ ]{0,32}"
# These override the options of a schema. "lenient" would ignore what cannot be compiled
OPTIONS = {"whitespace_pattern": WHITESPACE, "lenient": False}
JSON_KINDS = ("json_object", "json_schema", "call", "calls", "calls_or", "generic")
INSTALL = "pip install 'fastlm[serve]'"
MAX_BYTES = 2**16  # of a schema, an expression or a grammar; all tools may have four times that
# Digits of a JSON number before and after its point: a float has 17. Without a bound, a model could
# write digits to the end of the context.
MAX_DIGITS = 17
# Bounds of llguidance's work for a mask: a fifth of its defaults, with which a mask can take 2 s.
# 500 fields, 2,000 constants, 200 variants of an object and a text of 64 KiB stay below them.
LIMITS = {
    "initial_lexer_fuel": 300_000, "step_lexer_fuel": 60_000, "step_max_items": 10_000,
    "max_lexer_states": 50_000, "max_items_in_row": 500, "verbose_errors": False,
}  # fmt: skip


class OutputFormatError(InputError):
    """A format that cannot be compiled. ``param``: the field of the request that sets it."""

    def __init__(self, output_format: OutputFormat, message: object):
        super().__init__(f"{output_format.param}: {message}")
        self.param = output_format.param


class GrammarCompiler:
    """Compiles output formats for one tokenizer. Any thread may call its methods."""

    def __init__(self, tokenizer: "Tokenizer", config: "ModelConfig"):
        self.tokenizer, self.vocab_size = tokenizer, config.vocab_size
        self.stop_ids = sorted(tokenizer.stop_ids | config.stop_ids)
        self._lock = threading.Lock()

    def constraint(self, output_format: OutputFormat) -> "Callable[[], Constraint]":
        """Return the function that creates the state of an answer in this format
        (`Request.constraint`). OutputFormatError: the format cannot be compiled, or llguidance is
        not installed.
        """
        try:
            import llguidance
        except ImportError:
            message = f"expected llguidance on the server ({INSTALL}), not found"
            raise OutputFormatError(output_format, message) from None
        _check_size(output_format)
        with self._lock:
            tokens = self._tokens
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = None
        try:
            grammar = _grammar(output_format)
            _, warnings = llguidance.LLMatcher.validate_grammar_with_warnings(
                grammar, tokens, limits=limits
            )
            matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)
            problem = " ".join(warnings) or matcher.get_error()
        except InputError as error:
            raise OutputFormatError(output_format, error) from None
        except (ValueError, TypeError) as error:
            problem = str(error) or "it has no meaning"
        if problem or matcher is None:
            problem = " ".join(problem.split())
            message = f"expected what llguidance can compile, got: {problem:.400}"
            raise OutputFormatError(output_format, message)
        state = _State(matcher, self, output_format)
        try:
            state.check()
        except ConstraintError as error:
            raise OutputFormatError(output_format, error) from None
        return state.copy

    @cached_property
    def digit_mask(self) -> Tensor:
        """The tokens that begin with a digit, (V,) bool."""
        return torch.tensor([token[:1].isdigit() for token in self._token_bytes])

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        count = min(self.vocab_size, self.tokenizer.vocab_size)
        tokens = [self.tokenizer.token_bytes(i) for i in range(count)]
        return tokens + [b""] * (self.vocab_size - count)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token."""
        return self._token_bytes[token]

    @cached_property
    def _tokens(self) -> Any:
        """The vocabulary in the form that llguidance needs."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self.tokenizer, self._token_bytes, self.stop_ids)),
            n_vocab=self.vocab_size,
            eos_token=self.stop_ids or None,
        )


class _Vocabulary:
    """The vocabulary that llguidance's `TokenizerWrapper` reads."""

    def __init__(self, tokenizer: "Tokenizer", tokens: list[bytes], stop_ids: list[int]):
        self.tokenizer, self.tokens = tokenizer, tokens
        self.eos_token_id = stop_ids[0] if stop_ids else len(tokens) - 1
        self.bos_token_id = tokenizer.bos_id
        special = {token.encode() for token in tokenizer.special_tokens}
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if text in special]

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


class _State:
    """The state of an answer: a `Constraint`. ``forced``: the next tokens, where only one text can
    follow."""

    def __init__(self, matcher: Any, compiler: GrammarCompiler, output_format: OutputFormat):
        self.matcher, self.compiler, self.output_format = matcher, compiler, output_format
        self.forced: deque[int] = deque()
        self.json = (
            None
            if output_format.kind not in JSON_KINDS
            else _JsonText(output_format.kind == "calls")
        )

    def copy(self) -> "_State":
        """Return a copy, for another answer."""
        other = _State(self.matcher.deep_copy(), self.compiler, self.output_format)
        other.forced = self.forced.copy()
        return other

    def check(self) -> None:
        """Raise ConstraintError if no token can come first, or none after it."""
        mask = self.mask()
        if not bool(mask.any()):
            raise ConstraintError("expected a grammar that some text matches, got none")
        state = self.copy()
        state.accept(int(mask.long().argmax()))
        state.check_error()

    def check_error(self) -> None:
        """Raise ConstraintError if llguidance has reached one of its limits."""
        if self.matcher.is_error():
            problem = self.matcher.get_error().split("\n")[0]
            if problem.startswith("NoExtension"):
                problem = "no text matches it"
            raise ConstraintError(f"expected a smaller grammar, got: {problem:.200}")

    def mask(self) -> Tensor:
        """Return which tokens may come next, (V,) bool."""
        allowed = torch.zeros(self.compiler.vocab_size, dtype=torch.bool)
        if self.matcher.is_stopped() and not self.matcher.is_error():
            allowed[self.compiler.stop_ids] = True
            return allowed
        if not self.forced:
            # all of them: llguidance would encode the forced text again for each mask
            self.forced.extend(self.matcher.compute_ff_tokens())
        if self.forced:
            allowed[self.forced[0]] = True
            return allowed
        bitmask = self.matcher.compute_bitmask()
        self.check_error()
        words = torch.frombuffer(bytearray(bitmask), dtype=torch.uint8)
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = bits.flatten()[: self.compiler.vocab_size].bool()
        if self.json is not None and self.json.digits >= MAX_DIGITS:
            without_digits = allowed & ~self.compiler.digit_mask
            return without_digits if bool(without_digits.any()) else allowed
        return allowed

    def accept(self, token: int) -> None:
        """Advance by a token."""
        if self.forced and self.forced.popleft() != token:
            self.forced.clear()
        if self.json is not None:
            self.json.add(self.compiler.token_bytes(token))
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
            self.check_error()


class _JsonText:
    """Follows JSON. ``digits``: the number of digits of the current number. ``in_calls``: only the
    text between the marks of tool calls is JSON."""

    def __init__(self, in_calls: bool):
        self.digits = 0
        self._in_calls, self._text = in_calls, b""
        self._active, self._string, self._escape = not in_calls, False, False

    def add(self, data: bytes) -> None:
        """Read more bytes."""
        for byte in data:
            if self._in_calls:
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


def _check_size(output_format: OutputFormat) -> None:
    """Raise OutputFormatError for a format of more than `MAX_BYTES`, or tools of more than four
    times that."""
    match output_format.kind, output_format.value:
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
    for part, max_bytes in ((tools, MAX_BYTES * 4), (value, MAX_BYTES)):
        try:
            size = len(json.dumps(part, ensure_ascii=False).encode(errors="surrogatepass"))
        except RecursionError:
            size = max_bytes + 1
        if size > max_bytes:
            raise OutputFormatError(output_format, f"expected at most {max_bytes} bytes")


def _grammar(output_format: OutputFormat) -> str:
    """Return the grammar of a format, as llguidance serialises it."""
    from llguidance import LLMatcher, grammar_from

    if output_format.kind in ("json_object", "json_schema"):
        schema, options = json.dumps(_schema(output_format)), cast(Any, OPTIONS)
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)
    if output_format.kind == "regex":
        return LLMatcher.grammar_from_regex(output_format.value)
    if output_format.kind == "choice":
        return grammar_from("choice", json.dumps(output_format.value))
    if output_format.kind == "grammar":
        return LLMatcher.grammar_from_lark(output_format.value)
    rules = {"call": _text_calls, "calls": _calls, "calls_or": _calls_or, "generic": _generic}
    return LLMatcher.grammar_from_lark("\n".join(rules[output_format.kind](output_format.value)))


def _schema(output_format: OutputFormat) -> Any:
    return (
        {"type": "object"}
        if output_format.kind == "json_object"
        else close_objects(output_format.value)
    )


def _text_calls(tools: list[Any], start: str = "start") -> list[str]:
    """Return Lark rules of a call of one of the tools, as `fastlm.inference.tool_parser` reads
    it."""
    names = [f"call{i}" for i in range(len(tools))]
    rules = [f"{start}: {' | '.join(names)}"]
    for name, tool in zip(names, tools):
        function = tool["function"]
        prefix = f'{OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": '
        suffix = f"}}\n{CLOSE}"
        arguments = _arguments(close_arguments(function.get("parameters")))
        rules.append(f"{name}: {json.dumps(prefix)} {arguments} {json.dumps(suffix)}")
    return rules


def _calls_or(value: tuple[list[Any], bool, OutputFormat]) -> list[str]:
    """Return Lark rules of calls of the tools, or of JSON in another format."""
    tools, parallel, output_format = value
    return [
        "start: calls | form",
        f"calls: {'call (SPACE call)*' if parallel else 'call'}",
        f"form: {_json(_schema(output_format))}",
        f"SPACE: /{WHITESPACE}/",
        *_text_calls(tools, "call"),
    ]


def _generic(value: GenericTools) -> list[str]:
    """Return Lark rules of the format of `fastlm.serve.generic_tools`."""
    more = ' (SPACE "," SPACE call)*' if value.parallel else ""
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
    """Return Lark rules of text that may contain calls of the tools. The arguments of strict tools
    match their schemas. Without ``parallel``, there is at most one call, which ends the answer.
    """
    tools, parallel = value
    array = ' | "[" SPACE call (SPACE "," SPACE call)* SPACE "]"' if parallel else ""
    return [
        "start: block* REST" if parallel else "start: block | REST",
        f'block: head SPACE (call{array}) SPACE "{CLOSE}"',
        f'head[lazy]: TEXT "{OPEN}"',
        "TEXT: /(.|\\n)*/",
        f"REST: /(.|\\n)*/ & ~/(.|\\n)*{OPEN}(.|\\n)*/",
        *_json_calls(tools, lambda function: bool(function.get("strict"))),
    ]


def _json_calls(tools: "Sequence[Any]", is_strict: "Callable[[Any], bool]") -> "Iterator[str]":
    """Yield Lark rules of ``call``, a call of one of the tools as JSON. The arguments of a tool
    that ``is_strict`` match its schema."""
    yield f"call: {' | '.join(f'call{i}' for i in range(len(tools)))}"
    yield f"SPACE: /{WHITESPACE}/"
    for i, tool in enumerate(tools):
        function = tool["function"]
        parameters = close_arguments(function.get("parameters")) if is_strict(function) else {}
        parts = (
            '"{"', _quoted("name"), '":"', _quoted(function["name"]), '","', _quoted("arguments"),
            '":"', _arguments(parameters), '"}"',
        )  # fmt: skip
        yield f"call{i}: {' SPACE '.join(parts)}"


def _quoted(text: str) -> str:
    """Return Lark for a text as JSON."""
    return json.dumps(json.dumps(text))


def _arguments(parameters: Any) -> str:
    """Return Lark for an object that matches a schema."""
    return _json({"type": "object", **parameters})


def _json(schema: Any) -> str:
    """Return Lark for JSON that matches a schema."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return f"%json {json.dumps({**schema, 'x-guidance': OPTIONS})}"
