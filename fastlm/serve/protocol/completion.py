"""``POST /v1/completions``, and the fields that it shares with the other requests for answers."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import TypedDict

from fastlm.inference.forms import Form
from fastlm.inference.sampling import Sampling
from fastlm.serve.answer_form import structured_form
from fastlm.serve.api_error import ApiError
from fastlm.serve.protocol.body import (
    WHOLE,
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

MAX_CHOICES = 16  # answers to one prompt
MAX_PROMPTS = 64  # of one request to /v1/completions
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MIN_TEMPERATURE = 1e-6  # of `Sampling`, but for 0

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
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE]


class StreamOptions(TypedDict, total=False):
    include_usage: bool | None
    continuous_usage_stats: bool | None


class StructuredOutputs(TypedDict, total=False):
    """vLLM's: one of them."""

    json: JsonSchema | None
    regex: Pattern | None
    choice: Choices | None
    grammar: Pattern | None


class SamplingRequest(RequestBody):
    """How tokens are chosen and where an answer ends, and fields that change nothing."""

    model: ModelName
    stream: bool = False
    temperature: Temperature = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    logit_bias: LogitBias = {}
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), WHOLE] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31), WHOLE] = 0
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] = []
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] = []
    ignore_eos: bool = False

    metadata: dict[str, Any] | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Label | None = None
    user: Label | None = None


class GenerationRequest(SamplingRequest):
    """A request to /v1/completions or /v1/chat/completions."""

    max_tokens: PositiveInt | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] = 1
    repeat_penalty: RepetitionPenalty | None = None  # llama.cpp's name of repetition_penalty
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None  # vLLM's older names
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None

    cache_prompt: bool = True  # llama.cpp's: prompts are cached in any case
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    prediction: dict[str, Any] | None = None  # would only make it faster
    reasoning_effort: Label | None = None  # a variable of the chat templates that read it
    verbosity: Label | None = None

    _form: Form | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._use_name("repeat_penalty", "repetition_penalty")
        self._use_name("max_completion_tokens", "max_tokens")
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options: expected with stream true", param="stream_options")
        if self.continuous_usage and not self.include_usage:
            at = "stream_options.continuous_usage_stats"
            raise ApiError(f"{at}: expected with include_usage true", param=at)
        self._form = form = self._answer_form()
        for field in ("ignore_eos", "min_tokens"):
            if form is not None and getattr(self, field):
                raise ApiError(
                    f"{field}: expected without {form.param}, whose answers end where the form"
                    " does",
                    param=field,
                )
        return self

    def _use_name(self, alias: str, name: str) -> None:
        if (value := getattr(self, alias, None)) is not None:
            if name in self.model_fields_set:
                raise ApiError(f"{name}: expected this or {alias}, got both", param=name)
            setattr(self, name, value)

    def _answer_form(self) -> Form | None:
        guided = {
            "json": self.guided_json, "regex": self.guided_regex, "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }  # fmt: skip
        return structured_form(guided, self.structured_outputs)

    @property
    def form(self) -> Form | None:
        """The form that the answer must have."""
        return self._form

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def continuous_usage(self) -> bool:
        return bool((self.stream_options or {}).get("continuous_usage_stats"))

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are returned with each token; None: not even its own
        log-probability."""
        raise NotImplementedError

    def sampling(self) -> Sampling:
        bias = {int(token): bias for token, bias in self.logit_bias.items()}
        return Sampling(
            temperature=self.temperature,
            # vLLM and llama.cpp switch it off by -1 and 0
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(sorted(bias.items())),
        )


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, list):
        return "ids" if value and type(value[0]) in (int, float) else "list"
    return "text" if isinstance(value, str) else None


def _kind_in_list(value: Any) -> str | None:
    return {str: "text", list: "ids"}.get(type(value))


EXPECTED: Any = {"custom_error_type": "expected"}
PROMPT = Discriminator(
    _kind_of_prompt, custom_error_message="a text, token ids, or a list of them", **EXPECTED
)
ITEM = Discriminator(_kind_in_list, custom_error_message="a text or token ids", **EXPECTED)
Ids = Annotated[TokenIds, Field(min_length=1), Tag("ids")]
Prompts = Annotated[
    Annotated[Text, Tag("text")]
    | Ids
    | Annotated[
        list[Annotated[Annotated[Text, Tag("text")] | Ids, ITEM]],
        Field(min_length=1, fail_fast=True), Tag("list"),
    ],
    PROMPT,
]  # fmt: skip


def prompt_list(value: Any) -> list[str | list[int]]:
    """Return `Prompts` as a list of prompts."""
    return value if _kind_of_prompt(value) == "list" else [value]


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=2**31), WHOLE] | None = None
    echo: bool = False
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if (count := len(self.prompts)) * self.n > MAX_PROMPTS:
            raise ApiError(
                f"prompt: expected at most {MAX_PROMPTS} answers in one request, got {count}"
                f" prompts with n {self.n}",
                param="prompt",
            )
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens: expected at least 1, or 0 with echo, got 0",
                           param="max_tokens")  # fmt: skip
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return prompt_list(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class CompletionResponse(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
