"""The request of ``POST /v1/completions``, and the fields that it shares with other requests."""

import json
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    create_model,
    model_validator,
)
from typing_extensions import TypedDict

from fastlm.inference.output_format import OutputFormat
from fastlm.serve.api_error import field_error
from fastlm.serve.protocol.body import (
    INTEGER,
    JsonSchema,
    Label,
    ModelName,
    PositiveInt,
    RequestBody,
    Text,
    TokenIds,
    object_of,
    reject,
)
from fastlm.serve.protocol.foreign_fields import NEUTRAL

MAX_CHOICES = 16  # answers to one prompt
MAX_PROMPTS = 64  # of one request to /v1/completions
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MIN_TEMPERATURE = 1e-6  # of `Sampling`, except for 0

Temperature = Annotated[
    float,
    Field(ge=0, le=2),
    AfterValidator(lambda t: t if not 0 < t < MIN_TEMPERATURE else reject("0 or at least 1e-06")),
    WithJsonSchema(
        {"anyOf": [{"const": 0}, {"type": "number", "minimum": MIN_TEMPERATURE, "maximum": 2}]}
    ),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(ge=0.001, le=10)]
TOKEN_ID = "^[0-9]{1,9}$"
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=TOKEN_ID)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
    object_of(TOKEN_ID, {"type": "number", "minimum": -100, "maximum": 100}, maxProperties=1024),
]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Pattern = Annotated[str, Field(min_length=1, max_length=2**16)]  # a regular expression, a grammar
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=2**12)]],
    Field(min_length=1, max_length=1024),
]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), INTEGER]


class StreamOptions(TypedDict, total=False):
    include_usage: bool | None
    continuous_usage_stats: bool | None


class StructuredOutputs(TypedDict, total=False):
    """vLLM's field; exactly one key is set."""

    json: JsonSchema | None
    regex: Pattern | None
    choice: Choices | None
    grammar: Pattern | None


def _only(expected: Any, reason: str) -> Any:
    """Return the type of a field that accepts the ``expected`` value only."""

    def check(value: Any) -> Any:
        same = value == expected and isinstance(value, bool) == isinstance(expected, bool)
        return value if same else reject(f"{json.dumps(expected)}, since {reason}")

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"const": expected})]


_NEUTRAL_FIELDS: dict[str, Any] = {name: (_only(*row), None) for name, row in NEUTRAL.items()}
NeutralFields = create_model("NeutralFields", __base__=RequestBody, **_NEUTRAL_FIELDS)


class SamplingRequest(NeutralFields):
    """The fields for sampling and for the end of an answer, and fields without effect."""

    model: ModelName
    stream: bool = False
    temperature: Temperature = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31), INTEGER] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    logit_bias: LogitBias = {}
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), INTEGER] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31), INTEGER] = 0
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] = []
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] = []
    ignore_eos: bool = False

    keep_alive: Label | float | None = None  # Ollama's field; the model is always loaded
    metadata: dict[str, Any] | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    request_id: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Label | None = None
    user: Label | None = None


class GenerationRequest(SamplingRequest):
    """A request to /v1/completions or /v1/chat/completions."""

    max_tokens: PositiveInt | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), INTEGER] = 1
    repeat_penalty: RepetitionPenalty | None = None  # llama.cpp's name of repetition_penalty
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None

    best_of: PositiveInt | None = None
    cache_prompt: bool = True  # llama.cpp's field; prompts are always cached
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    prediction: dict[str, Any] | None = None  # would only be faster
    reasoning_effort: Label | None = None  # a variable of some chat templates
    verbosity: Label | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for alias, name in (
            ("repeat_penalty", "repetition_penalty"), ("max_completion_tokens", "max_tokens"),
        ):  # fmt: skip
            if (value := getattr(self, alias, None)) is not None:
                if name in self.model_fields_set:
                    raise field_error(name, f"expected this or {alias}, got both")
                setattr(self, name, value)
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "expected with stream true")
        if self.continuous_usage and not self.include_usage:
            raise field_error(
                "stream_options.continuous_usage_stats", "expected with include_usage true"
            )
        if self.best_of not in (None, 1, self.n):
            expected = f"expected 1 or n, since all answers are returned, got {self.best_of}"
            raise field_error("best_of", expected)
        output_format = self.output_format
        for field in ("ignore_eos", "min_tokens"):
            if output_format is not None and getattr(self, field):
                reason = "since that format decides where the answer ends"
                raise field_error(field, f"expected without {output_format.param}, {reason}")
        return self

    @cached_property
    def output_format(self) -> OutputFormat | None:
        """The format that the answer must have. ApiError: two formats, or an unknown one."""
        return self._output_format()

    def _output_format(self) -> OutputFormat | None:
        if self.structured_outputs is None:
            return None
        outputs = dict(self.structured_outputs)
        items = [(kind, value) for kind, value in outputs.items() if value is not None]
        if len(items) != 1:
            kinds = ", ".join(StructuredOutputs.__annotations__)
            raise field_error("structured_outputs", f"expected one of {kinds}, got {len(items)}")
        ((kind, value),) = items
        return OutputFormat(
            "json_schema" if kind == "json" else kind, value, f"structured_outputs.{kind}"
        )

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def continuous_usage(self) -> bool:
        return bool((self.stream_options or {}).get("continuous_usage_stats"))

    @property
    def num_logprobs(self) -> int | None:
        """The number of most likely tokens to return with each token; None: return no
        log-probabilities."""
        raise NotImplementedError


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, list):
        return "ids" if value and type(value[0]) in (int, float) else "list"
    return "text" if isinstance(value, str) else None


def _item_kind(value: Any) -> str | None:
    return {str: "text", list: "ids"}.get(type(value))


EXPECTED: Any = {"custom_error_type": "expected"}
PROMPT = Discriminator(
    _prompt_kind, custom_error_message="a text, token ids, or a list of them", **EXPECTED
)
ITEM = Discriminator(_item_kind, custom_error_message="a text or token ids", **EXPECTED)
Ids = Annotated[TokenIds, Field(min_length=1), Tag("ids")]
PromptInput = Annotated[
    Annotated[Text, Tag("text")]
    | Ids
    | Annotated[
        list[Annotated[Annotated[Text, Tag("text")] | Ids, ITEM]],
        Field(min_length=1, fail_fast=True), Tag("list"),
    ],
    PROMPT,
]  # fmt: skip


def prompt_list(value: Any) -> list[str | list[int]]:
    """Return `PromptInput` as a list of prompts."""
    return value if _prompt_kind(value) == "list" else [value]


class CompletionRequest(GenerationRequest):
    prompt: PromptInput
    max_tokens: Annotated[int, Field(ge=0, le=2**31), INTEGER] | None = None
    echo: bool = False
    logprobs: TopLogprobs | None = None

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if (count := len(self.prompts)) * self.n > MAX_PROMPTS:
            got = f"got {count} prompts with n {self.n}"
            raise field_error(
                "prompt", f"expected at most {MAX_PROMPTS} answers in one request, {got}"
            )
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "expected at least 1, or 0 with echo, got 0")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return prompt_list(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
