"""What an engine is asked for, and what it answers with: the types of `fastlm.inference.engine`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, Protocol

from torch import Tensor

from fastlm.errors import InputError
from fastlm.inference.answer_text import checked_stops
from fastlm.inference.block_manager import BLOCK_SIZE
from fastlm.inference.sampling import Sampling, check_seed

# "context": of `fastlm.serve.chat.Writer`, where "length" means the end of the context
FinishReason = Literal["stop", "length", "context", "cancelled", "deadline", "refused", "error"]


class ConstraintError(InputError):
    """A grammar that nothing can follow, or that takes too much: a fault of the request."""


class Constraint(Protocol):
    """A grammar's state along one answer (`fastlm.inference.structured_output`)."""

    def mask(self) -> Tensor:
        """Return which tokens may come next, (V,) bool."""
        ...

    def accept(self, token: int) -> None:
        """Move on by the token that was chosen."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    prompt: token ids, at least one.
    max_new_tokens: an answer ends after as many; also where the context is full.
    sampling: how to choose each token.
    seed: the same seed draws the same tokens, whatever else the engine runs. None: a random one.
    stop: strings that end the text, before they appear in it.
    stop_ids: tokens that end it, besides the end tokens of model and tokenizer.
    ignore_eos: only `stop` and `stop_ids` end it.
    min_new_tokens: no end token and no `stop_ids` before so many; a stop string ends it, too.
    logprobs: report this many of the likeliest tokens at each place; 0: only the chosen one's
        log-probability; None: nothing.
    prompt_logprobs: likewise of the prompt's tokens, at temperature 1, without penalties. The whole
        prompt is computed, whatever is cached of it.
    constraint: makes the grammar's state, called once in `submit`; the state is used by one thread
        at a time, not the engine's (`fastlm.inference.masks`). After a token that ends the answer,
        it is not asked again.
    deadline: seconds from `Engine.submit` after which the answer ends as it is.
    client: requests wait in one queue per client, and the queues take turns.
    cache_salt: cached prompts are shared by requests with the same salt alone, so that
        `Piece.cached_tokens` and times tell nothing of what others asked.
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
    ``options``: further fields of `Request`. InputError: a seed that no generator takes."""
    check_seed(seed)
    seeds = [None if seed is None else (seed + i) % 2**63 for i in range(len(prompts))]
    return [
        Request(prompt, max_new_tokens, sampling, seed=own, **options)
        for prompt, own in zip(prompts, seeds, strict=True)
    ]


def request_seed(seed: int, key: str, sample: int = 0) -> int:
    """Return the seed of a request that ``key`` names: the same whatever other requests there are.
    ``sample``: tells several requests of one key apart."""
    text = f"{seed}/{sample}/{key}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=7).digest())


def room_of(
    request: Request, *, vocab: int, context_limit: int, cached: int, has_tokenizer: bool
) -> int:
    """Return the most tokens that a request may draw. ``cached``: tokens that a cache has room for.

    Raises InputError: what `fastlm.inference.engine.Engine.submit` refuses.
    """
    prompt = request.prompt
    if not prompt:
        raise InputError("prompt: expected at least one token, got none")
    if min(prompt) < 0 or max(prompt) >= vocab:
        bad = min(prompt) if min(prompt) < 0 else max(prompt)
        raise InputError(f"prompt: expected ids in [0, {vocab}), got {bad}")
    if request.max_new_tokens < 1:
        raise InputError(f"max_new_tokens: expected at least 1, got {request.max_new_tokens}")
    room = min(request.max_new_tokens, context_limit - len(prompt))
    if room < 1:
        raise InputError(
            f"prompt: expected fewer than the {context_limit} tokens of the context,"
            f" got {len(prompt)}"
        )
    if -(-(len(prompt) + room) // BLOCK_SIZE) * BLOCK_SIZE > cached:
        raise InputError(
            f"prompt, max_new_tokens: expected at most the cache's {cached}"
            f" tokens in all, got {len(prompt)} + {room}"
        )
    if request.min_new_tokens > room:
        raise InputError(
            f"min_new_tokens: expected at most the {room} that the answer may have,"
            f" got {request.min_new_tokens}"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if (count := getattr(request, name)) is not None and not 0 <= count <= vocab:
            raise InputError(f"{name}: expected 0 to {vocab} or None, got {count}")
    if request.stop and not has_tokenizer:
        raise InputError("stop: expected an engine with a tokenizer, got one without")
    checked_stops(request.stop)
    return room


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability, and the likeliest tokens at its place, best first.

    Log-probabilities are those of the model's softmax at the request's temperature (1 when
    greedy), before top-k, top-p and min-p, after penalties, `logit_bias` and grammar. `top` has
    only tokens that may come next.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain of an answer with one more token.

    `text` lags behind `tokens` where a character is incomplete or a stop string may begin; the
    texts of all pieces join to the answer's. An end token is in `tokens`, not in the text.
    The last piece alone has a `finish_reason`: "stop" at an end token or a stop string, "length"
    at max_new_tokens or the end of the context, or "cancelled", "deadline", "refused" (its grammar
    cannot go on) and "error", both with `error`, one line. The first piece with a token has the
    `prompt_logprobs`, of the prompt's second token and those after it.
    """

    tokens: list[int]
    text: str
    logprobs: list[TokenLogprob]  # one per token where the request asks for them
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0  # of the prompt: found in the prefix cache; told in the last piece
    prompt_tokens: int = 0  # told in the last piece
    queue_seconds: float | None = None  # told in the last piece; None: it never began
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


Listener = Callable[[Piece], Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; see `Piece`. Fields are named as vLLM's are."""

    token_ids: list[int]
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    # tokens at the prompt's beginning that the caller left out, because they did not fit
    truncated_prompt_tokens: int = 0

    @property
    def ended(self) -> bool:
        """Whether the model ended it, by an end token or a stop string, not a limit."""
        return self.finish_reason == "stop"


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and what it holds now."""

    running: int  # requests with pages
    waiting: int
    pages: int
    page_bytes: int  # of keys and values
    pages_used: int  # by running requests
    pages_cached: int  # of requests that ended, given up when pages run short
    steps: int
    prompt_tokens: int  # computed as prompts, cached ones excluded, preempted answers included
    cached_tokens: int  # found in the prefix cache
    new_tokens: int
    preemptions: int
    finished: dict[str, int]  # by finish_reason
    drafted_tokens: int = 0  # guessed and computed
    accepted_tokens: int = 0  # of them: what was drawn
    draft_failures: int = 0  # answers for which the draft model failed, which run without it


class Closed(InputError):
    """The engine takes no more requests."""

    def __init__(self) -> None:
        super().__init__("engine: expected one that runs, got one that was closed")


class QueueFull(InputError):
    """As many requests wait as the engine was told to queue. `retry_after`: seconds, a guess from
    the present speed."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"queue: expected room for one more, got {waiting} waiting")
        self.retry_after = retry_after
