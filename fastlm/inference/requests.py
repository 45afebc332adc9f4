"""Requests and completions: the types of `fastlm.inference.engine`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, Protocol

from torch import Tensor

from fastlm.errors import InputError
from fastlm.inference.answer_text import check_stop_strings
from fastlm.inference.block_manager import BLOCK_SIZE
from fastlm.inference.sampling import Sampling, check_seed

# "context": only from `fastlm.serve.text_generator.TextGenerator`: the context is full
FinishReason = Literal["stop", "length", "context", "cancelled", "deadline", "refused", "error"]


class ConstraintError(InputError):
    """A grammar that no token can follow, or whose masks take too long: a fault of the request."""


class Constraint(Protocol):
    """A grammar's state along one answer (`fastlm.inference.structured_output`)."""

    def mask(self) -> Tensor:
        """Return which tokens may come next, (V,) bool."""
        ...

    def accept(self, token: int) -> None:
        """Advance by a sampled token."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    prompt: token ids, at least one.
    max_new_tokens: the answer ends after this many tokens, or where the context is full.
    sampling: how each token is sampled.
    seed: the same seed draws the same tokens, whatever else the engine runs. None: a random seed.
    stop: strings that end the text, before they appear in it.
    stop_ids: tokens that end the answer, in addition to the end tokens of model and tokenizer.
    ignore_eos: only `stop` and `stop_ids` end the answer.
    min_new_tokens: no end token and none of `stop_ids` is sampled before this many tokens. A stop
        string ends the answer all the same.
    logprobs: the number of most likely tokens to report at each position; 0: only the
        log-probability of the sampled token; None: nothing.
    prompt_logprobs: likewise for the tokens of the prompt, at temperature 1, without penalties. The
        prompt is computed in full, even where it is cached.
    constraint: makes the state of a grammar; `submit` calls it once. One thread at a time uses the
        state, and not the engine's (`fastlm.inference.token_masks`). It is not used after the token
        that ends the answer.
    deadline: the answer ends as it is this many seconds after `Engine.submit`.
    client: requests wait in one queue per client, and the queues take turns.
    cache_salt: only requests with the same salt share cached prompts, so that
        `Piece.cached_tokens` and times reveal nothing about the requests of others.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Callable[[], Constraint] | None = None
    deadline: float | None = None
    client: str = ""
    cache_salt: bytes = b""


def batch_requests(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int | None = None,
    **options: Any,
) -> list[Request]:
    """Make a request of each prompt. Prompt i draws with ``seed + i``, or with a random seed.
    ``options``: other fields of `Request`. InputError: a seed that no generator accepts."""
    check_seed(seed)
    seeds = [None if seed is None else (seed + i) % 2**63 for i in range(len(prompts))]
    return [
        Request(prompt, max_new_tokens, sampling, seed=prompt_seed, **options)
        for prompt, prompt_seed in zip(prompts, seeds, strict=True)
    ]


def request_seed(seed: int, key: str, sample: int = 0) -> int:
    """Return the seed of a request with the name ``key``. It does not depend on other requests.
    ``sample``: the number of the request among those with the same key."""
    text = f"{seed}/{sample}/{key}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=7).digest())


def max_new_tokens_for(
    request: Request, *, vocab: int, context_limit: int, cache_tokens: int, has_tokenizer: bool
) -> int:
    """Return how many tokens may be sampled for a request. ``cache_tokens``: the number of tokens
    that the cache can hold.

    Raises InputError for what `fastlm.inference.engine.Engine.submit` refuses.
    """
    prompt = request.prompt
    if not prompt:
        raise InputError("prompt: expected at least one token, got none")
    if min(prompt) < 0 or max(prompt) >= vocab:
        token = min(prompt) if min(prompt) < 0 else max(prompt)
        raise InputError(f"prompt: expected ids in [0, {vocab}), got {token}")
    if request.max_new_tokens < 1:
        raise InputError(f"max_new_tokens: expected at least 1, got {request.max_new_tokens}")
    max_new_tokens = min(request.max_new_tokens, context_limit - len(prompt))
    if max_new_tokens < 1:
        raise InputError(
            f"prompt: expected fewer than the {context_limit} tokens of the context,"
            f" got {len(prompt)}"
        )
    if -(-(len(prompt) + max_new_tokens) // BLOCK_SIZE) * BLOCK_SIZE > cache_tokens:
        raise InputError(
            f"prompt, max_new_tokens: expected at most the cache's {cache_tokens}"
            f" tokens in all, got {len(prompt)} + {max_new_tokens}"
        )
    if request.min_new_tokens > max_new_tokens:
        raise InputError(
            f"min_new_tokens: expected at most the {max_new_tokens} that the answer may have,"
            f" got {request.min_new_tokens}"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if (count := getattr(request, name)) is not None and not 0 <= count <= vocab:
            raise InputError(f"{name}: expected 0 to {vocab} or None, got {count}")
    if request.stop and not has_tokenizer:
        raise InputError("stop: expected an engine with a tokenizer, got one without")
    check_stop_strings(request.stop)
    return max_new_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability, and the most likely tokens at its position, best first.

    Log-probabilities are those of the model's softmax at the request's temperature (1 for greedy
    decoding), before top-k, top-p and min-p, after penalties, `logit_bias` and grammar. `top` has
    only tokens that may come next.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of an answer that one more token adds.

    `text` lags behind `tokens` where a character is incomplete or a stop string may begin. The
    texts of all pieces join to that of the answer. An end token is in `tokens`, not in the text.

    Only the last piece has a `finish_reason`: "stop" at an end token or a stop string, "length" at
    max_new_tokens or the end of the context, "cancelled", "deadline", "refused" (its grammar cannot
    continue) or "error"; the last two have a line in `error`. Only the last piece has
    `cached_tokens`, `prompt_tokens` and `queue_seconds`. The first piece with a token has the
    `prompt_logprobs`, which begin with the prompt's second token.
    """

    tokens: list[int]
    text: str
    logprobs: list[TokenLogprob]  # one per token where the request asks for them
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0  # tokens of the prompt that came from the prefix cache
    prompt_tokens: int = 0
    queue_seconds: float | None = None  # None: the request never ran
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


Listener = Callable[[Piece], Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete answer; see `Piece`. Its fields have vLLM's names."""

    token_ids: list[int]
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    # tokens at the beginning of the prompt that the caller left out, because they did not fit
    truncated_prompt_tokens: int = 0

    @property
    def is_stopped(self) -> bool:
        """Whether an end token or a stop string ended it, not a limit."""
        return self.finish_reason == "stop"


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was created, and its state now."""

    running: int  # requests with blocks
    waiting: int
    num_blocks: int
    block_bytes: int  # of keys and values
    used_blocks: int  # by running requests
    cached_blocks: int  # of requests that ended, evicted when blocks run short
    steps: int
    prompt_tokens: int  # computed as prompts; includes preempted answers, not cached tokens
    cached_tokens: int  # from the prefix cache
    new_tokens: int
    preemptions: int
    finished: dict[str, int]  # by finish_reason
    drafted_tokens: int = 0  # proposed and computed
    accepted_tokens: int = 0  # draft tokens that were sampled
    draft_failures: int = 0  # answers for which the draft model failed; they run without it


class EngineClosed(InputError):
    """The engine takes no more requests."""

    def __init__(self) -> None:
        super().__init__("engine: expected an open engine, got a closed one")


class QueueFull(InputError):
    """`max_queue_size` requests wait already. `retry_after`: seconds, an estimate from the present
    speed."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"queue: expected fewer waiting requests, got {waiting}")
        self.retry_after = retry_after
