"""Environments of rollouts: what the policy talks to between its turns, and three tools of our own.

The option ``environment`` names one of `ENVIRONMENTS`, or the user's own class as ``file.py:Class``
or ``package.module:Class``. `fastlm.train.episodes` runs them.
"""

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from fastlm.data.conversations import Message
from fastlm.data.verifiers import import_object
from fastlm.errors import InputError
from fastlm.inference.output_format import CLOSE, OPEN
from fastlm.inference.tool_parser import ToolParser
from fastlm.sandbox import SandboxError, SandboxLimits, check_machine, run_code

if TYPE_CHECKING:
    from fastlm.train.search import SearchIndex

MAX_OBSERVATION = 2000  # characters of the results of a turn
MAX_CALLS = 4  # of a turn: they run one after another
MAX_EXPRESSION = 200  # characters
MAX_BITS = 1024  # of a whole number, about 300 digits: more is no arithmetic exercise
MAX_QUERY = 400  # characters: each word costs a pass over the passages that have it
RESULTS = 3  # passages of a search, as in Search-R1 (Jin et al. 2025, arXiv:2503.09516)
EXPRESSION = re.compile(rf"[0-9\s.+\-*/%()]{{1,{MAX_EXPRESSION}}}")
PYTHON_LIMITS = SandboxLimits(seconds=2, wall=10.0, memory=2**28, output=2**14, threads=0)


class Environment:
    """What the policy talks to. Each completion has its own object, made without arguments."""

    tools: ClassVar[list[Any]] = []
    """The definitions of tools that the prompt lists, in OpenAI's format."""

    role: ClassVar[str] = "user"
    """The role of the messages that are observations. If the chat template does not write messages
    of the role "tool", such observations are inserted into the answer as text."""

    stop: ClassVar[tuple[str, ...]] = ()
    """Texts that end a turn, as its end token does. They belong to the turn."""

    def reset(self, row: Mapping[str, Any]) -> list[Message] | None:
        """Begin an episode. ``row``: the prompt's row of data. Return the messages of the prompt;
        None: those of the row. The same row always gives the same messages.
        """
        return None

    def step(self, text: str) -> str | None:
        """Return the observation after a complete turn of the policy; None ends the episode."""
        raise NotImplementedError

    def reward(self) -> float:
        """Return the reward of the episode, which is added to the other scores. An episode may have
        ended without None from `step`, at the limit of tokens or turns.
        """
        return 0.0


class ToolEnvironment(Environment):
    """Tools that the policy calls by ``<tool_call>{"name", "arguments"}</tool_call>``. A turn
    without a call ends the episode. A call that fails has its error as observation.
    """

    role = "tool"
    stop = (CLOSE,)

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return the result of a call. Any exception becomes an observation."""
        raise NotImplementedError

    def step(self, text: str) -> str | None:
        if CLOSE not in text:
            return None
        names = [tool["function"]["name"] for tool in self.tools]
        parser = ToolParser(names, json_answer=False)
        parser.push(text)
        parser.end()
        if not parser.tool_calls:
            call = f'{OPEN}{{"name": NAME, "arguments": {{...}}}}{CLOSE}'
            return f"Error: expected {call}, with a name of {', '.join(names)}"
        results = [self._observe(call["function"]) for call in parser.tool_calls[:MAX_CALLS]]
        if len(parser.tool_calls) > MAX_CALLS:
            results.insert(0, f"Error: expected at most {MAX_CALLS} calls; the others did not run")
        return "\n".join(results)[:MAX_OBSERVATION]

    def _observe(self, function: Mapping[str, str]) -> str:
        try:
            arguments = json.loads(function["arguments"])
            if not isinstance(arguments, dict):
                raise InputError(f"arguments: expected an object, got {arguments!r:.60}")
            return self.call(function["name"], arguments)[:MAX_OBSERVATION]
        except InputError as error:
            return f"Error: {error}"[:MAX_OBSERVATION]
        except Exception as error:
            return f"Error: {type(error).__name__}: {error}"[:MAX_OBSERVATION]


def tool_definition(name: str, description: str, argument: str) -> dict[str, Any]:
    """Return the definition of a tool with one text argument, in OpenAI's format."""
    parameters = {
        "type": "object", "properties": {argument: {"type": "string"}}, "required": [argument],
    }  # fmt: skip
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


class Calculator(ToolEnvironment):
    """The tool ``calculator(expression)``; see `calculate`."""

    tools: ClassVar[list[Any]] = [
        tool_definition(
            "calculator", "Compute numbers with + - * / // % ** and parentheses.", "expression"
        )
    ]

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return calculate(arguments.get("expression"))


def calculate(expression: Any) -> str:
    """Return the value of an arithmetic expression of numbers.

    It is parsed, never evaluated as Python: numbers, + - * / // % ** and parentheses. InputError:
    anything else, a division by 0, a result that is not real, or a number of more than `MAX_BITS`.
    """
    if not isinstance(expression, str) or not EXPRESSION.fullmatch(expression):
        raise InputError(
            f"expression: expected 1 to {MAX_EXPRESSION} digits, spaces and + - * / // % ** . ( ),"
            f" got {expression!r:.60}"
        )
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise InputError(f"expression: expected arithmetic, got {expression!r:.60}") from None
    except ArithmeticError as error:  # a division by 0, an overflow
        raise InputError(f"expression: {error}") from None
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _power(base: int | float, exponent: int | float) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        if abs(base) > 1 and base.bit_length() * exponent > MAX_BITS:
            raise OverflowError("the result is too large")
    return base**exponent


def _divide(dividend: int | float, divisor: int | float) -> int | float:
    """Divide; a whole quotient of whole numbers is exact."""
    if isinstance(dividend, int) and isinstance(divisor, int) and divisor:
        quotient, remainder = divmod(dividend, divisor)
        if not remainder:
            return quotient
    return dividend / divisor


OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: _divide, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: _power, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


def _evaluate(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: Any = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_evaluate(node.operand))
    else:
        raise InputError(f"expression: expected numbers and operators, got {type(node).__name__}")
    if isinstance(value, complex) or not math.isfinite(value):
        raise ArithmeticError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError("the result is too large")
    return value


@cache
def _check_sandbox() -> None:
    try:
        check_machine()
    except SandboxError as error:
        raise InputError(f"environment: {error}") from None


class PythonInterpreter(ToolEnvironment):
    """The tool ``python(code)``: what a program prints, in `fastlm.sandbox` with `PYTHON_LIMITS`.
    Calls share nothing. InputError: the machine lacks a feature of the sandbox.
    """

    tools: ClassVar[list[Any]] = [
        tool_definition("python", "Run a Python program and return what it prints.", "code")
    ]

    def __init__(self) -> None:
        _check_sandbox()

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        code = arguments.get("code")
        if not isinstance(code, str):
            raise InputError(f"code: expected a text, got {code!r:.60}")
        outcome = run_code(code, "pass", limits=PYTHON_LIMITS)
        output = outcome.output[:MAX_OBSERVATION]
        if outcome.passed:
            return output or "(no output)"
        error = f"Error: {outcome.reason}: {outcome.detail}"[: MAX_OBSERVATION // 2]
        return f"{output[: MAX_OBSERVATION - len(error) - 1]}\n{error}" if output else error


class Search(ToolEnvironment):
    """The tool ``search(query)``: the passages of a corpus that match best, each after the id of
    its document. The corpus is that of a subclass from `with_index`.
    """

    tools: ClassVar[list[Any]] = [
        tool_definition(
            "search", "Search documents and return the passages that match best.", "query"
        )
    ]

    index: ClassVar["SearchIndex"]

    @classmethod
    def with_index(cls, index: "SearchIndex") -> type["Search"]:
        """Return a subclass whose objects search ``index``."""
        return type(cls.__name__, (cls,), {"index": index})

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        query = arguments.get("query")
        if not isinstance(query, str) or len(query) > MAX_QUERY:
            raise InputError(
                f"query: expected a text of at most {MAX_QUERY} characters, got {query!r:.60}"
            )
        results = self.index.search(query, RESULTS)
        return "\n".join(f"[{result.id}] {result.text}" for result in results) or "(no results)"


ENVIRONMENTS: dict[str, type[Environment]] = {
    "calculator": Calculator,
    "python": PythonInterpreter,
    "search": Search,
}


def load_environment(name: str) -> type[Environment]:
    """Return the class that the option ``environment`` names. InputError: as `import_object`, or
    another class than an `Environment`.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    value = import_object("environment", name, ENVIRONMENTS, "class")
    if not isinstance(value, type) or not issubclass(value, Environment):
        raise InputError(
            f"environment: expected a subclass of fastlm.train.environments.Environment, got {name}"
        )
    return value


def has_reward(environment: type[Environment]) -> bool:
    """Return whether episodes in the environment have a reward."""
    return environment.reward is not Environment.reward
