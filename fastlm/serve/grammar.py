"""Answers of a given form: JSON, a JSON schema, a regular expression, one of some texts, a grammar.

llguidance compiles the form and says at each place which tokens may come next. A form that it
cannot compile, or that it would only keep to in part, is refused.
"""

import json
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.serve.fields import ApiError
from fastlm.serve.forms import Form
from fastlm.serve.generic_tools import GenericTools
from fastlm.serve.requests import Constraint
from fastlm.serve.tools import CLOSE, OPEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fastlm.model.config import ModelConfig
    from fastlm.tokenizer.tokenizer import Tokenizer

# Between the parts of JSON: as compact or indented JSON has it. Any amount would let a model write
# spaces to the end of the context.
WHITESPACE = r"[ ]?|\n[ ]{0,32}"
# over what a schema itself may say: "lenient" ignores what cannot be compiled
OPTIONS = {"whitespace_pattern": WHITESPACE, "lenient": False}
INSTALL = "pip install 'fastlm[serve]'"


class Grammars:
    """Compiles forms for one tokenizer. Its methods may run in any thread."""

    def __init__(self, tokenizer: "Tokenizer", config: "ModelConfig"):
        self.tokenizer, self.vocab_size = tokenizer, config.vocab_size
        self.ends = sorted(tokenizer.stop_ids | config.stop_ids)
        self._lock = threading.Lock()

    def constraint(self, form: Form) -> "Callable[[], Constraint]":
        """What makes the state of an answer of this form (`Request.constraint`). ApiError: the form
        cannot be compiled, llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise ApiError(
                f"{form.param}: wanted llguidance on the server ({INSTALL}), not found",
                param=form.param,
            ) from None
        with self._lock:
            tokens = self._tokens
        limits = llguidance.LLParserLimits(verbose_errors=False)
        try:
            grammar = _grammar(form)
            failed, told = llguidance.LLMatcher.validate_grammar_with_warnings(
                grammar, tokens, limits=limits
            )
            matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)
            refusal = " ".join(told) or matcher.get_error()
        except (ValueError, TypeError) as error:
            failed, refusal, matcher = True, str(error), None
        if failed or refusal or matcher is None:
            text = " ".join((refusal or "it has no meaning").split())
            raise ApiError(
                f"{form.param}: wanted what llguidance can compile, got: {text:.400}",
                param=form.param,
            )
        return lambda: _State(matcher.deep_copy(), self.vocab_size, self.ends)

    @cached_property
    def _tokens(self) -> Any:
        """The vocabulary as llguidance has it."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self.tokenizer, self.vocab_size, self.ends)),
            n_vocab=self.vocab_size,
            eos_token=self.ends or None,
        )


class _Vocabulary:
    """What llguidance's `TokenizerWrapper` reads."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, ends: list[int]):
        self.tokenizer = tokenizer
        self.eos_token_id = ends[0] if ends else vocab_size - 1
        self.bos_token_id = tokenizer.bos_id
        known = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(i) for i in range(known)]
        self.tokens += [b""] * (vocab_size - known)
        special = {token.encode() for token in tokenizer.special_tokens}
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if text in special]

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


class _State:
    """A `Constraint`."""

    def __init__(self, matcher: Any, vocab_size: int, ends: list[int]):
        self.matcher, self.vocab_size = matcher, vocab_size
        self.ends = torch.tensor(ends, dtype=torch.int64)

    def mask(self) -> Tensor:
        """Which tokens may come next, (V,) bool."""
        if self.matcher.is_stopped() and not self.matcher.is_error():
            allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
            allowed[self.ends] = True
            return allowed
        found = self.matcher.compute_bitmask()
        if self.matcher.is_error():  # too much work for a step; the engine ends the request
            raise InputError(f"grammar: wanted a smaller one: {self.matcher.get_error():.200}")
        words = torch.frombuffer(bytearray(found), dtype=torch.uint8)
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: self.vocab_size].bool()

    def accept(self, token: int) -> None:
        """Move on by a token."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)


def _grammar(form: Form) -> str:
    from llguidance import LLMatcher, grammar_from

    if form.kind in ("json_object", "json_schema"):
        schema = {"type": "object"} if form.kind == "json_object" else form.value
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
        arguments = _arguments(function.get("parameters"))
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
            f"form: {_json(schema)}",
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
        rules.append(f'response: {response} SPACE ":" SPACE {_json(value.response)}')
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
        arguments = _arguments(function.get("parameters") if keeps(function) else None)
        parts = ('"{"', called[0], '":"', called[1], '","', called[2], '":"', arguments, '"}"')
        yield f"{name}: {' SPACE '.join(parts)}"


def _arguments(parameters: Any) -> str:
    """Lark for an object that keeps to a schema."""
    return _json({"type": "object", **(parameters or {})})


def _json(schema: Any) -> str:
    """Lark for JSON that keeps to a schema."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return f"%json {json.dumps({**schema, 'x-guidance': OPTIONS})}"
